//! A table for the terminal, and the same as Markdown.

use std::fmt::Write;

/// On which side of its column a cell stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    /// Words.
    Left,
    /// Numbers, so that their digits stand below each other.
    Right,
}

/// Rows under a header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    columns: Vec<(String, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these columns and no rows.
    pub fn new(columns: &[(&str, Align)]) -> Table {
        Table { columns: columns.iter().map(|(name, align)| (plain(name), *align)).collect(), rows: Vec::new() }
    }

    /// Appends a row; cells that are missing are empty, and those beyond the last column are dropped.
    pub fn row<Cell: ToString>(&mut self, cells: impl IntoIterator<Item = Cell>) {
        let mut row: Vec<String> = cells.into_iter().map(|cell| plain(&cell.to_string())).collect();
        row.resize(self.columns.len(), String::new());
        self.rows.push(row);
    }

    /// For the terminal: two spaces between columns, a line under the header, no spaces at the end of a line.
    pub fn text(&self) -> String {
        let widths = self.widths(0);
        let header: Vec<String> = self.columns.iter().map(|(name, _)| name.clone()).collect();
        let rule: Vec<String> = widths.iter().map(|width| "─".repeat(*width)).collect();
        let mut text = String::new();
        for row in [&header, &rule].into_iter().chain(&self.rows) {
            let cells: Vec<String> = self.padded(row, &widths);
            text += cells.join("  ").trim_end();
            text.push('\n');
        }
        text
    }

    /// As GitHub's Markdown, which reads well as it stands too.
    pub fn markdown(&self) -> String {
        let escape = |cell: &String| cell.replace('|', "\\|");
        let escaped = Table {
            columns: self.columns.iter().map(|(name, align)| (escape(name), *align)).collect(),
            rows: self.rows.iter().map(|row| row.iter().map(escape).collect()).collect(),
        };
        // A delimiter is three characters at least.
        let widths = escaped.widths(3);
        let header: Vec<String> = escaped.columns.iter().map(|(name, _)| name.clone()).collect();
        let rule: Vec<String> = std::iter::zip(&escaped.columns, &widths)
            .map(|((_, align), width)| match align {
                Align::Left => "-".repeat(*width),
                Align::Right => "-".repeat(width - 1) + ":",
            })
            .collect();
        let mut text = String::new();
        for row in [&header, &rule].into_iter().chain(&escaped.rows) {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "| {} |", escaped.padded(row, &widths).join(" | "));
        }
        text
    }

    fn widths(&self, least: usize) -> Vec<usize> {
        let cells = |index: usize| self.rows.iter().filter_map(move |row| row.get(index));
        let columns = self.columns.iter().enumerate();
        columns
            .map(|(index, (name, _))| cells(index).map(|cell| width(cell)).fold(width(name).max(least), usize::max))
            .collect()
    }

    fn padded(&self, row: &[String], widths: &[usize]) -> Vec<String> {
        let cells = row.iter().zip(&self.columns).zip(widths);
        cells
            .map(|((cell, (_, align)), width)| match align {
                Align::Left => format!("{cell:<width$}"),
                Align::Right => format!("{cell:>width$}"),
            })
            .collect()
    }
}

/// A cell is one line.
fn plain(cell: &str) -> String {
    cell.split(['\n', '\r', '\t']).collect::<Vec<_>>().join(" ")
}

fn width(cell: &str) -> usize {
    cell.chars().count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn example() -> Table {
        let mut table = Table::new(&[("stage", Align::Left), ("loss", Align::Right), ("exact", Align::Right)]);
        table.row(["teacher", "–", "1.000"]);
        table.row(["MIL | 4", "12.25", "0.1"]);
        table.row(["α"]);
        table
    }

    #[test]
    fn text_is_aligned_with_numbers_at_the_right() {
        let expected = concat!(
            "stage     loss  exact\n",
            "───────  ─────  ─────\n",
            "teacher      –  1.000\n",
            "MIL | 4  12.25    0.1\n",
            "α\n",
        );
        assert_eq!(example().text(), expected);
    }

    #[test]
    fn markdown_is_the_same_table() {
        let expected = concat!(
            "| stage    |  loss | exact |\n",
            "| -------- | ----: | ----: |\n",
            "| teacher  |     – | 1.000 |\n",
            "| MIL \\| 4 | 12.25 |   0.1 |\n",
            "| α        |       |       |\n",
        );
        assert_eq!(example().markdown(), expected);
    }

    proptest! {
        #[test]
        fn every_line_has_every_column(
            cells in prop::collection::vec(prop::collection::vec("[ab|é\n]{0,5}", 0..5), 0..5),
        ) {
            let mut table = Table::new(&[("a", Align::Left), ("b", Align::Right), ("c", Align::Left)]);
            for row in &cells {
                table.row(row);
            }
            prop_assert_eq!(table.text().lines().count(), cells.len() + 2);
            let markdown = table.markdown();
            let length = markdown.lines().next().map(|line| line.chars().count());
            for line in markdown.lines() {
                prop_assert_eq!(line.replace("\\|", "").matches('|').count(), 4);
                prop_assert_eq!(Some(line.chars().count()), length);
            }
        }
    }
}
