//! Attention, rotary positions, pages of keys and values.

use crate::backend::check::{Check, Checked};
use crate::backend::{DeviceId, Result, SegmentsView, View};

/// Rotates each head by its token's position, in place: with `x1`, `x2` the halves of a head and
/// `a = position·inv_freq[j]`, `(x1 cos a − x2 sin a, x2 cos a + x1 sin a)`. Its gradient is the inverse rotation.
#[derive(Clone, Copy, Debug)]
pub struct Rope {
    /// `[tokens, heads·head_dim]`, read and written.
    pub x: View,
    /// Width of a head; even.
    pub head_dim: usize,
    /// `[1, tokens]` u32.
    pub positions: View,
    /// `[1, head_dim/2]` f32.
    pub inv_freq: View,
    /// Rotate the other way.
    pub inverse: bool,
}

impl Checked for Rope {
    fn check(&self, device: DeviceId) -> Result<()> {
        let mut check = Check::new("rope", device);
        let heads = self.head_dim > 0 && self.head_dim.is_multiple_of(2) && self.x.cols.is_multiple_of(self.head_dim);
        check.require(heads, || format!("{} columns are not whole heads of {}", self.x.cols, self.head_dim))?;
        check.ids("positions", self.positions, 1, self.x.rows)?;
        check.input("inv_freq", self.inv_freq, 1, self.head_dim / 2)?;
        check.output("x", self.x, self.x.rows, self.x.cols)?;
        check.finish()
    }
}

/// The sizes of grouped-query attention: query head `j` reads the key head `j / (heads / kv_heads)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// Query heads, a multiple of `kv_heads`.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Factor of the scores, head_dim^-½ as a rule.
    pub scale: f32,
    /// A query at position p sees keys p − window + 1 ..= p.
    pub window: Option<usize>,
}

impl AttentionShape {
    /// Columns of q.
    pub fn q_cols(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Columns of k and of v.
    pub fn kv_cols(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    fn check(&self, check: &Check) -> Result<()> {
        let groups = self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads) && self.head_dim > 0;
        check.require(groups && self.window != Some(0), || format!("{self:?} is no whole number of groups of keys"))
    }
}

/// Where the keys and values of the segments lie.
#[derive(Clone, Copy, Debug)]
pub enum Keys {
    /// One segment after the other, `past + len` rows each, from the row that the segments' table says.
    Rows {
        /// `[keys, kv_heads·head_dim]`.
        k: View,
        /// `[keys, kv_heads·head_dim]`.
        v: View,
    },
    /// In pages: position p of slot s lies in row `pages[s, p / page_size]·page_size + p % page_size`.
    Pages {
        /// `[page count · page_size, kv_heads·head_dim]`.
        k: View,
        /// `[page count · page_size, kv_heads·head_dim]`.
        v: View,
        /// `[slots, pages a slot]` u32.
        pages: View,
        /// Tokens of a page.
        page_size: usize,
    },
}

/// [`Rope`] of queries and keys that lie side by side, then [`PageWrite`] of the keys and of values.
#[derive(Clone, Copy, Debug)]
pub struct RopePageWrite {
    /// Rotates; its last columns are the keys.
    pub rope: Rope,
    /// Its keys are those.
    pub write: PageWrite,
}

impl Checked for RopePageWrite {
    fn check(&self, device: DeviceId) -> Result<()> {
        let (rope, write) = (self.rope, self.write);
        rope.check(device)?;
        write.check(device)?;
        let ([keys, values], [all_keys, all_values]) = (write.rows, write.out);
        let mut check = Check::new("rope_page_write", device);
        let last = keys.col_in(rope.x).is_some_and(|first| first + keys.cols == rope.x.cols);
        let heads = keys.cols.is_multiple_of(rope.head_dim);
        check.require(last && heads, || "the keys are not the last heads that are rotated".into())?;
        check.input("inv_freq", rope.inv_freq, 1, rope.head_dim / 2)?;
        check.ids("pages", write.pages, write.pages.rows, write.pages.cols)?;
        check.segments(&write.segments, keys.rows)?;
        check.output("x", rope.x, rope.x.rows, rope.x.cols)?;
        check.output("all_keys", all_keys, all_keys.rows, keys.cols)?;
        check.output("all_values", all_values, all_keys.rows, keys.cols)?;
        let behind = values.offset.checked_sub(rope.x.offset).is_some_and(|first| {
            let inside = first.checked_add(values.cols).is_some_and(|end| end <= rope.x.stride);
            first >= rope.x.cols && inside && values.stride == rope.x.stride
        });
        let apart = values.buffer != rope.x.buffer || behind;
        check.require(apart, || "the values are neither behind what is rotated nor in another buffer".into())?;
        check.finish()
    }
}

/// Causal attention: the query of a row at position p, `past ≤ p < past + len`, over the segment's keys 0..=p.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// The heads.
    pub shape: AttentionShape,
    /// `[tokens, heads·head_dim]`.
    pub q: View,
    /// Keys and values, those of the segment's own rows included.
    pub keys: Keys,
    /// Who belongs to whom.
    pub segments: SegmentsView,
    /// `[tokens, heads·head_dim]`.
    pub out: View,
    /// `[tokens, heads]` f32: the log-sum-exp of the scaled scores, kept for backward.
    pub lse: Option<View>,
}

impl Checked for Attention {
    fn check(&self, device: DeviceId) -> Result<()> {
        let (shape, tokens) = (&self.shape, self.q.rows);
        let mut check = Check::new("attention", device);
        shape.check(&check)?;
        check.input("q", self.q, tokens, shape.q_cols())?;
        let (Keys::Rows { k, v } | Keys::Pages { k, v, .. }) = self.keys;
        check.input("k", k, k.rows, shape.kv_cols())?;
        check.input("v", v, k.rows, shape.kv_cols())?;
        if let Keys::Pages { pages, page_size, .. } = self.keys {
            check.ids("pages", pages, pages.rows, pages.cols)?;
            check.require(page_size > 0, || "pages of no token".into())?;
        }
        check.segments(&self.segments, tokens)?;
        check.output("out", self.out, tokens, shape.q_cols())?;
        check.maybe_output("lse", self.lse, tokens, shape.heads)?;
        check.finish()
    }
}

/// The gradients of [`Attention`] over keys in rows.
#[derive(Clone, Copy, Debug)]
pub struct AttentionBackward {
    /// The heads.
    pub shape: AttentionShape,
    /// `[tokens, heads·head_dim]`.
    pub q: View,
    /// `[keys, kv_heads·head_dim]`.
    pub k: View,
    /// `[keys, kv_heads·head_dim]`.
    pub v: View,
    /// Who belongs to whom.
    pub segments: SegmentsView,
    /// `[tokens, heads·head_dim]`, from forward.
    pub out: View,
    /// `[tokens, heads]`, from forward.
    pub lse: View,
    /// `[tokens, heads·head_dim]`.
    pub dout: View,
    /// `[tokens, heads·head_dim]`.
    pub dq: View,
    /// `[keys, kv_heads·head_dim]`, of all keys.
    pub dk: View,
    /// `[keys, kv_heads·head_dim]`, of all keys.
    pub dv: View,
}

impl Checked for AttentionBackward {
    fn check(&self, device: DeviceId) -> Result<()> {
        let (shape, tokens, keys) = (&self.shape, self.q.rows, self.k.rows);
        let mut check = Check::new("attention_backward", device);
        shape.check(&check)?;
        check.input("q", self.q, tokens, shape.q_cols())?;
        check.input("k", self.k, keys, shape.kv_cols())?;
        check.input("v", self.v, keys, shape.kv_cols())?;
        check.segments(&self.segments, tokens)?;
        check.input("out", self.out, tokens, shape.q_cols())?;
        check.input("lse", self.lse, tokens, shape.heads)?;
        check.input("dout", self.dout, tokens, shape.q_cols())?;
        check.output("dq", self.dq, tokens, shape.q_cols())?;
        check.output("dk", self.dk, keys, shape.kv_cols())?;
        check.output("dv", self.dv, keys, shape.kv_cols())?;
        check.finish()
    }
}

/// Writes the keys and the values of each segment into the pages of its slot, at their positions (see [`Keys::Pages`]).
#[derive(Clone, Copy, Debug)]
pub struct PageWrite {
    /// Keys and values, each `[tokens, width]`.
    pub rows: [View; 2],
    /// Who belongs to whom.
    pub segments: SegmentsView,
    /// `[slots, pages a slot]` u32.
    pub pages: View,
    /// Tokens of a page.
    pub page_size: usize,
    /// Those of all pages, each `[page count · page_size, width]`; rows that no token goes to stay as they are.
    pub out: [View; 2],
}

impl Checked for PageWrite {
    fn check(&self, device: DeviceId) -> Result<()> {
        let mut check = Check::new("page_write", device);
        check.require(self.page_size > 0, || "pages of no token".into())?;
        let ([keys, values], [all_keys, all_values]) = (self.rows, self.out);
        check.input("keys", keys, keys.rows, keys.cols)?;
        check.input("values", values, keys.rows, keys.cols)?;
        check.segments(&self.segments, keys.rows)?;
        check.ids("pages", self.pages, self.pages.rows, self.pages.cols)?;
        check.output("all_keys", all_keys, all_keys.rows, keys.cols)?;
        check.output("all_values", all_values, all_keys.rows, keys.cols)?;
        check.finish()
    }
}
