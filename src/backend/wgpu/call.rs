//! A call of an op: its views become bindings, its sizes a uniform block, its work dispatches.
//!
//! ```ignore
//! pub fn swiglu(call: &mut Call, op: &ops::Swiglu) -> Result<()> {
//!     let (rows, cols) = (op.out.rows, op.out.cols);
//!     call.dispatch(shaders::SWIGLU.kernel("forward", &[]))
//!         .read(op.gate).read(op.up).write(op.out)   // @group(0) @binding(0), (1), (2); p.gate, p.up, p.out
//!         .size(rows).size(cols)                     // p.tokens, p.width
//!         .grid([cols.div_ceil(64), rows, 1])        // workgroups, cut to what the adapter takes: shaders go on by
//! }                                                  // the size of the grid
//! ```

use super::Gpu;
use super::memory::Window;
use super::pipelines::{Access, PARAMETERS};
use super::rows;
use super::scratch::Slot;
use super::shaders::Kernel;
use crate::backend::{DType, Error, Order, Out, Result, View};

/// An op under way.
pub(super) struct Call<'g> {
    /// The op's name.
    pub op: &'static str,
    pub gpu: &'g mut Gpu,
}

impl Call<'_> {
    /// That all views lie in their buffers: what an op of several dispatches asks before the first.
    ///
    /// # Errors
    /// When one does not.
    pub fn check(&self, views: impl IntoIterator<Item = View>) -> Result<()> {
        views.into_iter().try_for_each(|view| self.gpu.memory.check(view))
    }

    /// Whether the number of rows may choose no kernel and no tile.
    pub fn batch_invariant(&self) -> bool {
        self.gpu.abilities.batch_invariant
    }

    /// Begins a dispatch.
    pub fn dispatch(&mut self, kernel: Kernel) -> Dispatch<'_> {
        let none = Access::default();
        Dispatch {
            op: self.op,
            gpu: self.gpu,
            kernel,
            windows: Vec::new(),
            access: none,
            numbers: Vec::new(),
            copied: Vec::new(),
            error: None,
        }
    }

    /// f32 scratch of `rows × cols`, whose values are of no dispatch of another op.
    ///
    /// # Errors
    /// When it was not reserved and the device has no room.
    pub fn scratch(&mut self, slot: Slot, rows: usize, cols: usize) -> Result<View> {
        self.scratch_of(DType::F32, slot, rows, cols)
    }

    /// The same of another dtype.
    ///
    /// # Errors
    /// As [`Call::scratch`].
    pub fn scratch_of(&mut self, dtype: DType, slot: Slot, rows: usize, cols: usize) -> Result<View> {
        self.gpu.scratch.view(&mut self.gpu.memory, &mut self.gpu.recorder, (slot, dtype), rows, cols)
    }

    /// Values that a binding can show of each of some views, wherever they start.
    pub fn values_at_once(&self, views: &[View]) -> usize {
        views.iter().map(|view| self.gpu.memory.shown(view.dtype)).min().unwrap_or(usize::MAX)
    }

    /// Rows that a binding can show of each of some views; at least 1.
    pub fn rows_at_once(&self, views: &[View]) -> usize {
        let values = self.values_at_once(views);
        let fit = |view: &View| (values.saturating_sub(view.cols) / view.stride.max(1)).saturating_add(1);
        views.iter().map(fit).min().unwrap_or(usize::MAX)
    }

    /// The rows of views of as many rows each, in blocks that a binding can show of all of them: the first row of each, and how
    /// many. A block ends where a view goes on in another part of its buffer; a row that lies in two is a block of its own.
    pub fn row_blocks(&self, views: &[View]) -> Vec<(usize, usize)> {
        let rows = views.first().map_or(0, |view| view.rows);
        let (at_once, mut first, mut blocks) = (self.rows_at_once(views), 0, Vec::new());
        while first < rows {
            let of_part = views.iter().map(|view| self.gpu.memory.rows_of_part(*view, first)).min().unwrap_or(rows);
            let count = of_part.max(1).min(at_once).min(rows - first);
            blocks.push((first, count));
            first += count;
        }
        blocks
    }

    /// The values of single rows of as many values each, in such blocks.
    pub fn value_blocks(&self, views: &[View]) -> Vec<(usize, usize)> {
        let values = views.first().map_or(0, |view| view.cols);
        let (at_once, mut first, mut blocks) = (self.values_at_once(views).max(1), 0, Vec::new());
        while first < values {
            let of_part = |view: &View| self.gpu.memory.rest_of_part(view.dtype, view.offset.saturating_add(first));
            let of_part = views.iter().map(of_part).min().unwrap_or(values);
            let count = of_part.min(at_once).min(values - first);
            blocks.push((first, count));
            first += count;
        }
        blocks
    }

    /// The dtype of activations of one op.
    ///
    /// # Errors
    /// When they have several.
    pub fn dtype(&self, views: &[View]) -> Result<DType> {
        let first = views.first().map_or(DType::F32, |view| view.dtype);
        match views.iter().find(|view| view.dtype != first) {
            None => Ok(first),
            Some(other) => Err(Error::Unsupported {
                backend: "wgpu",
                op: self.op,
                what: format!("rows of {first} beside rows of {}", other.dtype),
            }),
        }
    }
}

/// `0..total` in blocks of `at_once`: the first of each, and how many.
pub(super) fn blocks(total: usize, at_once: usize) -> impl Iterator<Item = (usize, usize)> {
    let at_once = at_once.max(1);
    (0..total).step_by(at_once).map(move |first| (first, at_once.min(total - first)))
}

/// A matrix without gaps between its rows as a single row.
pub(super) fn flat(view: View) -> Option<View> {
    let len = view.len();
    let contiguous = view.rows <= 1 || view.stride == view.cols;
    contiguous.then_some(View { order: Order::Rows, rows: 1, cols: len, stride: len, ..view })
}

/// A dispatch under way; an error of one of its views is given at the end, by [`Dispatch::grid`].
#[must_use = "nothing is dispatched before `grid`"]
pub(super) struct Dispatch<'c> {
    op: &'static str,
    gpu: &'c mut Gpu,
    kernel: Kernel,
    windows: Vec<Window>,
    access: Access,
    numbers: Vec<u32>,
    /// Views that no window can show, and copies of them in scratch that are written in their place.
    copied: Vec<(View, View)>,
    error: Option<Error>,
}

impl Dispatch<'_> {
    fn bind(mut self, view: Option<View>, written: bool) -> Self {
        let window = match view {
            Some(view) if self.gpu.plan.is_some() => self.gpu.memory.check(view).map(|()| None),
            Some(view) => self.window(view, written).map(Some),
            None => Ok(Some(self.gpu.scratch.nothing(written))),
        };
        self.access.written |= u32::from(written) << self.access.bindings;
        self.access.bindings += 1;
        match window {
            Ok(window) => self.windows.extend(window),
            Err(error) => self.error = self.error.or(Some(error)),
        }
        self
    }

    /// The window of a view, or of a copy of its values where they lie in two parts of a buffer, or too far apart.
    fn window(&mut self, view: View, written: bool) -> Result<Window> {
        if let Some(window) = self.gpu.memory.window(view)? {
            return Ok(window);
        }
        let plain = View { order: Order::Rows, rows: view.span().len() / view.cols, ..view };
        let whole = if view.order == Order::Weight { plain } else { view };
        if whole.len() > self.gpu.memory.shown(view.dtype) {
            return Err(self.gpu.memory.too_large(self.op, view));
        }
        let mut call = Call { op: self.op, gpu: self.gpu };
        let copy = call.scratch_of(view.dtype, Slot::Copy(self.access.bindings), whole.rows, whole.cols)?;
        move_values(&mut call, whole, copy, Direction::There)?;
        if written {
            self.copied.push((whole, copy));
        }
        self.gpu.memory.window(copy)?.ok_or_else(|| self.gpu.memory.too_large(self.op, view))
    }

    /// The next binding is this view, which the shader reads (`var<storage, read>`).
    pub fn read(self, view: View) -> Self {
        self.bind(Some(view), false)
    }

    /// The next binding is this view, which the shader writes, or reads and writes (`var<storage, read_write>`).
    pub fn write(self, view: View) -> Self {
        self.bind(Some(view), true)
    }

    /// The next binding is read where there is a view; else it is 16 bytes of no meaning, and an `override` constant
    /// tells the shader.
    pub fn maybe_read(self, view: Option<View>) -> Self {
        self.bind(view, false)
    }

    /// The next binding is written where there is a view.
    pub fn maybe_write(self, view: Option<View>) -> Self {
        self.bind(view, true)
    }

    /// The next number of the uniform block, a u32.
    pub fn size(mut self, value: usize) -> Self {
        match u32::try_from(value) {
            Ok(value) => self.numbers.push(value),
            Err(_) => self.error = self.error.or(Some(Error::Size { what: "size", value })),
        }
        self
    }

    /// The next number of the uniform block, an f32; after all sizes.
    pub fn factor(mut self, value: f32) -> Self {
        self.numbers.push(value.to_bits());
        self
    }

    /// Dispatches a grid of workgroups, each side cut to what the adapter takes; a side of 0 dispatches nothing.
    ///
    /// # Errors
    /// When a view does not lie in its buffer, the kernel cannot be made, or the device is lost.
    pub fn grid(self, grid: [usize; 3]) -> Result<()> {
        let Dispatch { op, gpu, kernel, windows, access, numbers, copied, error } = self;
        if let Some(error) = error {
            return Err(error);
        }
        let mut block: Vec<u32> = windows.iter().flat_map(|window| [window.first, window.stride]).collect();
        block.extend(numbers);
        debug_assert!(block.len() * 4 <= PARAMETERS as usize, "{op}");
        let most = gpu.abilities.grid as usize;
        let grid = grid.map(|side| side.min(most) as u32);
        if grid.contains(&0) {
            return Ok(());
        }
        if let Some(plan) = &mut gpu.plan {
            plan.push((kernel, access));
            return Ok(());
        }
        let pipeline = gpu.pipelines.get(&kernel, access).map_err(|what| gpu.failed(op, what))?;
        gpu.recorder.dispatch(&mut gpu.pipelines, &pipeline, access, &windows, &block, grid);
        let mut call = Call { op, gpu };
        copied.into_iter().try_for_each(|(view, copy)| move_values(&mut call, view, copy, Direction::Back))
    }
}

/// Which way values go between a view and its copy.
#[derive(Clone, Copy, PartialEq)]
enum Direction {
    There,
    Back,
}

/// Copies a view of any size, piece by piece, to a copy without gaps that a window can show, or back.
fn move_values(call: &mut Call, view: View, copy: View, direction: Direction) -> Result<()> {
    let (view, copy) = flat(view).zip(flat(copy)).unwrap_or((view, copy));
    for (row, col, piece) in call.gpu.memory.pieces(view)? {
        let beside = copy.row_range(row, piece.rows)?.col_range(col, piece.cols)?;
        let (src, out) = if direction == Direction::There { (piece, beside) } else { (beside, piece) };
        rows::copy_part(call, src, Out::assign(out))?;
    }
    Ok(())
}
