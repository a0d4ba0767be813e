//! Recordings of a trainer's micro-batches.

use crate::backend::{Device, Recording, Result, View};

/// How many are kept: each takes memory of the device.
const KEPT: usize = 8;

/// What fixes the launches of a micro-batch, beside the memory that they are made in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub tokens: usize,
    /// Rows of the head.
    pub rows: usize,
    /// The teacher's outputs, where they are there before.
    pub outputs: Option<View>,
}

/// Recordings by the shapes that came last; the latest lies behind.
#[derive(Debug, Default)]
pub(super) struct Recordings(Vec<(Shape, Recording)>);

impl Recordings {
    /// As [`Recording::run`] with the recording of `shape`.
    pub fn run(&mut self, device: &Device, shape: Shape, ops: impl FnMut() -> Result<()>) -> Result<()> {
        let found = match self.0.iter().position(|(other, _)| *other == shape) {
            Some(at) => self.0.remove(at),
            None => {
                self.0.drain(..(self.0.len() + 1).saturating_sub(KEPT));
                (shape, device.recording())
            }
        };
        let done = found.1.run(ops);
        self.0.push(found);
        done
    }

    /// Forgets all of them.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::reference::Reference;

    #[test]
    fn the_shapes_that_came_last_are_kept() {
        let (device, mut recordings) = (Device::new(Reference::new()), Recordings::default());
        let shape = |rows| Shape { tokens: 2 * KEPT, rows, outputs: None };
        for rows in [0, 1].into_iter().chain(0..KEPT).chain([0, KEPT]) {
            let mut done = false;
            let ops = || {
                done = true;
                Ok(())
            };
            recordings.run(&device, shape(rows), ops).unwrap();
            assert!(done && recordings.0.len() <= KEPT);
        }
        let kept: Vec<_> = recordings.0.iter().map(|(shape, _)| shape.rows).collect();
        assert_eq!(kept, (2..KEPT).chain([0, KEPT]).collect::<Vec<_>>());
        recordings.clear();
        assert!(recordings.0.is_empty());
    }
}
