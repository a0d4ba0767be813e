//! Scratch of the ops: f32 buffers by slot, as large as the largest call so far or as `reserve` made them.

use super::memory::{Memory, Window};
use super::recorder::Recorder;
use crate::backend::{BufferId, DType, DeviceId, Order, Result, View};

/// What scratch is for. An op holds a slot from its first dispatch to its last; two views of one op lie in two slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Slot {
    /// Partial sums, and what an op keeps between its dispatches.
    Partials,
    /// Partial sums of those.
    Totals,
}

const SLOTS: usize = 2;

/// The scratch of a device.
pub(super) struct Scratch {
    slots: [Option<(BufferId, usize)>; SLOTS],
    /// Two buffers of nothing, to read and to write, for bindings of what is absent.
    nothing: [Window; 2],
}

fn flat(buffer: BufferId, len: usize) -> View {
    // The backend's own views belong to no device that a caller could name.
    let device = DeviceId(u32::MAX);
    View { device, buffer, dtype: DType::F32, order: Order::Rows, offset: 0, rows: 1, cols: len, stride: len }
}

impl Scratch {
    pub fn new(memory: &mut Memory) -> Result<Self> {
        let mut nothing = || {
            let buffer = memory.alloc("nothing", DType::F32, 4)?;
            memory.window("open", flat(buffer, 4))
        };
        Ok(Scratch { slots: [None; SLOTS], nothing: [nothing()?, nothing()?] })
    }

    /// The binding of a view that is absent.
    pub fn nothing(&self, written: bool) -> Window {
        let [read, write] = &self.nothing;
        if written { write.clone() } else { read.clone() }
    }

    /// A view of `rows × cols` values in a slot, which grows if it must.
    pub fn view(
        &mut self,
        memory: &mut Memory,
        recorder: &mut Recorder,
        slot: Slot,
        rows: usize,
        cols: usize,
    ) -> Result<View> {
        let len = rows.checked_mul(cols).ok_or_else(|| memory.out_of_memory("scratch", usize::MAX))?;
        let held = &mut self.slots[slot as usize];
        let buffer = match *held {
            Some((buffer, there)) if there >= len => buffer,
            old => {
                let buffer = memory.alloc("scratch", DType::F32, len)?;
                if let Some((old, _)) = old {
                    recorder.forget(old);
                    memory.free(old);
                }
                *held = Some((buffer, len));
                buffer
            }
        };
        Ok(View { rows, cols, stride: cols, ..flat(buffer, len) })
    }
}
