//! The numbers that ops read from device memory to find rows by: a backend in host memory can hold them against the sizes of
//! the call before it follows them.

use crate::backend::{Error, Result, SEGMENT_FIELDS};

/// A segment as the device holds it: start, len, past, slot, and the first row of its keys.
pub type Row = [u32; SEGMENT_FIELDS];

fn require(op: &'static str, holds: bool, what: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::Argument { op, what: what() }) }
}

/// The segments that have rows.
fn present(table: &[Row]) -> impl Iterator<Item = &Row> + Clone {
    table.iter().filter(|[_, len, ..]| *len > 0)
}

/// The segments cover every row of `tokens` once, in order.
pub fn cover(op: &'static str, table: &[Row], tokens: usize) -> Result<()> {
    let mut next = 0;
    for &[start, len, ..] in present(table) {
        require(op, start as usize == next, || format!("a segment starts at row {start}, expected {next}"))?;
        next += len as usize;
    }
    require(op, next == tokens, || format!("segments of {next} rows for {tokens} tokens"))
}

/// No two segments share a slot, and each slot is below `slots`.
pub fn slots(op: &'static str, table: &[Row], slots: usize) -> Result<()> {
    let all = present(table).map(|&[_, _, _, slot, _]| slot);
    below(op, "slot", all.clone(), slots)?;
    distinct(op, "slot", all)
}

/// The keys of every segment lie in `rows`.
pub fn keys(op: &'static str, table: &[Row], rows: usize) -> Result<()> {
    present(table).try_for_each(|&[_, len, past, _, keys]| {
        let end = keys as usize + past as usize + len as usize;
        require(op, end <= rows, || format!("a segment's keys end at row {end} of {rows}"))
    })
}

/// The pages of a call.
pub struct Pages<'a> {
    /// `[slots, width]`, row-major.
    pub table: &'a [u32],
    /// Pages of a slot.
    pub width: usize,
    /// Tokens of a page.
    pub page_size: usize,
    /// Rows of the pool.
    pub rows: usize,
}

impl Pages<'_> {
    /// The row of a position of a slot.
    pub fn row(&self, slot: u32, position: u32) -> usize {
        let (slot, position) = (slot as usize, position as usize);
        self.table[slot * self.width + position / self.page_size] as usize * self.page_size + position % self.page_size
    }

    /// The pages that a segment's own rows go to.
    fn own_pages(&self, &[_, len, past, slot, _]: &Row) -> impl Iterator<Item = u32> + Clone {
        let (first, last) = (past as usize / self.page_size, (past as usize + len as usize - 1) / self.page_size);
        let row = slot as usize * self.width;
        self.table[row + first..=row + last].iter().copied()
    }

    /// Every position of every segment up to its last, or those of its own rows alone, lies in a page of the pool; its own
    /// rows in pages that are its alone.
    pub fn check(&self, op: &'static str, table: &[Row], own_rows: bool) -> Result<()> {
        for &[_, len, past, slot, _] in present(table) {
            let first = if own_rows { past as usize / self.page_size } else { 0 };
            let last = (past as usize + len as usize - 1) / self.page_size;
            require(op, last < self.width, || format!("page {last} of a slot that has {}", self.width))?;
            let row = slot as usize * self.width;
            let pages = self.table.get(row + first..=row + last);
            let pages = pages.ok_or_else(|| Error::Argument { op, what: format!("no pages for slot {slot}") })?;
            below(op, "page", pages.iter().copied(), self.rows / self.page_size)?;
        }
        if own_rows {
            distinct(op, "page", present(table).flat_map(|row| self.own_pages(row)))?;
        }
        Ok(())
    }
}

/// Each of the numbers is below a bound.
pub fn below(op: &'static str, what: &str, numbers: impl Iterator<Item = u32>, bound: usize) -> Result<()> {
    numbers.into_iter().try_for_each(|n| require(op, (n as usize) < bound, || format!("{what} {n} of {bound}")))
}

/// No number comes twice. Rising numbers, which is how callers give them, cost one comparison each.
pub fn distinct(op: &'static str, what: &str, numbers: impl Iterator<Item = u32> + Clone) -> Result<()> {
    if numbers.clone().zip(numbers.clone().skip(1)).all(|(a, b)| a < b) {
        return Ok(());
    }
    numbers.clone().enumerate().try_for_each(|(i, n)| {
        require(op, numbers.clone().skip(i + 1).all(|other| other != n), || format!("{what} {n} comes twice"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_that_lead_outside_are_errors_and_empty_segments_are_not_looked_at() {
        let empty = [9, 0, 9, 9, 9];
        let table = [[0, 2, 0, 1, 0], empty, [2, 3, 4, 0, 2]];
        assert!(cover("op", &table, 5).is_ok());
        assert!(cover("op", &table, 6).is_err());
        assert!(cover("op", &table[1..], 3).is_err());
        assert!(slots("op", &table, 2).is_ok());
        assert!(slots("op", &table, 1).is_err());
        assert!(slots("op", &[table[0], table[0]], 2).is_err());
        assert!(keys("op", &table, 9).is_ok());
        assert!(keys("op", &table, 8).is_err());
    }

    #[test]
    fn pages_are_looked_at_as_far_as_positions_go() {
        let table = [[0, 2, 2, 1, 0]];
        let pages = |table, page_size, rows| Pages { table, width: 2, page_size, rows };
        assert!(pages(&[9, 9, 0, 1], 2, 4).check("op", &table, false).is_ok());
        assert!(pages(&[9, 9, 0, 2], 2, 4).check("op", &table, false).is_err());
        assert!(pages(&[9, 9, 7, 1], 2, 4).check("op", &table, true).is_ok());
        assert!(pages(&[9, 9, 7, 1], 2, 4).check("op", &table, false).is_err());
        assert!(pages(&[9, 9, 0, 0], 1, 4).check("op", &table, false).is_err());
        assert!(pages(&[0, 1], 2, 4).check("op", &table, false).is_err());
        let two = [table[0], [2, 1, 0, 0, 4]];
        assert!(pages(&[0, 9, 9, 1], 2, 4).check("op", &two, true).is_ok());
        assert!(pages(&[1, 9, 9, 1], 2, 4).check("op", &two, true).is_err());
    }
}
