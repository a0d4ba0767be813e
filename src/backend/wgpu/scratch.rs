//! Scratch of the ops: buffers by slot and dtype, as large as the largest call so far or as `reserve` made them.

use std::collections::HashMap;

use super::memory::{Memory, Window};
use super::recorder::Recorder;
use crate::backend::{BufferId, DType, DeviceId, Order, Result, View};

/// What scratch is for. An op holds a slot from its first dispatch to its last; two views of one op lie in two slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Slot {
    /// Partial sums, and what an op keeps between its dispatches.
    Partials,
    /// Partial sums of those.
    Totals,
    /// A copy of what the binding of this number cannot show in place.
    Copy(u32),
    /// An argument or a result of an op that is run on a block of its columns at a time.
    Block(u32),
}

/// The buffer of each slot, and its values.
pub(super) type Slots = HashMap<(Slot, DType), (BufferId, usize)>;

/// The scratch of a device.
pub(super) struct Scratch {
    slots: Slots,
    /// Two buffers of nothing, to read and to write, for bindings of what is absent.
    nothing: [Window; 2],
}

pub(super) fn row(buffer: BufferId, dtype: DType, len: usize) -> View {
    // The backend's own views belong to no device that a caller could name.
    let device = DeviceId(u32::MAX);
    View { device, buffer, dtype, order: Order::Rows, offset: 0, rows: 1, cols: len, stride: len }
}

impl Scratch {
    pub fn new(memory: &mut Memory) -> Result<Self> {
        let mut nothing = || {
            let buffer = memory.alloc("nothing", DType::F32, 4)?;
            memory.window(row(buffer, DType::F32, 4))?.ok_or_else(|| memory.out_of_memory("nothing", 16))
        };
        Ok(Scratch { slots: HashMap::new(), nothing: [nothing()?, nothing()?] })
    }

    /// The binding of a view that is absent.
    pub fn nothing(&self, written: bool) -> Window {
        let [read, write] = &self.nothing;
        if written { write.clone() } else { read.clone() }
    }

    /// Takes all slots out.
    pub fn take(&mut self) -> Slots {
        std::mem::take(&mut self.slots)
    }

    /// Puts slots back in the place of those that were made since.
    pub fn put_back(&mut self, slots: Slots, memory: &mut Memory) {
        let made = std::mem::replace(&mut self.slots, slots);
        made.into_values().for_each(|(buffer, _)| memory.free(buffer));
    }

    /// A view of `rows × cols` values in a slot, which grows if it must.
    pub fn view(
        &mut self,
        memory: &mut Memory,
        recorder: &mut Recorder,
        slot: (Slot, DType),
        rows: usize,
        cols: usize,
    ) -> Result<View> {
        let len = rows.checked_mul(cols).ok_or_else(|| memory.out_of_memory("scratch", usize::MAX))?;
        let buffer = match self.slots.get(&slot).copied() {
            Some((buffer, there)) if there >= len => buffer,
            old => {
                let buffer = memory.alloc("scratch", slot.1, len)?;
                if let Some((old, _)) = old {
                    recorder.forget(old);
                    memory.free(old);
                }
                self.slots.insert(slot, (buffer, len));
                buffer
            }
        };
        Ok(View { rows, cols, stride: cols, ..row(buffer, slot.1, len) })
    }
}
