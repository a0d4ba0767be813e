//! Pinned host memory between the program and the card, so that no copy waits for another.

use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{self, CUevent, CUresult};

use super::real::{Context, check};
use crate::backend::Result;

/// Bytes of a slot of the ring, and how many of these there are.
pub const SLOT: usize = 2 << 20;
const SLOTS: usize = 16;

/// An event of a context, destroyed when dropped.
pub struct Event(CUevent);

// SAFETY: events may be used by any thread.
unsafe impl Send for Event {}

impl Event {
    /// One that has not been recorded.
    pub fn new(context: &Context) -> Result<Self> {
        let mut event = std::ptr::null_mut();
        let untimed = sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: writes a handle; the context is current.
        context.check("making an event", unsafe { sys::cuEventCreate(&mut event, untimed) })?;
        Ok(Event(event))
    }

    /// Marks all that the stream was given so far.
    pub fn record(&self, context: &Context) -> Result<()> {
        // SAFETY: both are handles of the context.
        context.check("recording an event", unsafe { sys::cuEventRecord(self.0, context.stream) })
    }

    /// Waits for what it marks.
    pub fn wait(&self, context: &Context) -> Result<()> {
        context.enter()?;
        // SAFETY: a handle of the context.
        context.check("waiting for the device", unsafe { sys::cuEventSynchronize(self.0) })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `new`.
        unsafe { sys::cuEventDestroy_v2(self.0) };
    }
}

/// Pinned memory, given back when dropped.
pub struct Pinned {
    start: *mut c_void,
    len: usize,
}

// SAFETY: owned memory of the host.
unsafe impl Send for Pinned {}

impl Pinned {
    /// `len` bytes.
    pub fn new(context: &Context, len: usize) -> Result<Self> {
        let mut start = std::ptr::null_mut();
        // SAFETY: writes an address; the context is current.
        let result = unsafe { sys::cuMemAllocHost_v2(&mut start, len.max(1)) };
        context.check("pinning host memory", result)?;
        // SAFETY: just allocated.
        unsafe { start.cast::<u8>().write_bytes(0, len) };
        Ok(Pinned { start, len })
    }

    /// Its address.
    pub fn address(&self) -> *mut c_void {
        self.start
    }

    /// Its first bytes. Nothing may be on its way into them.
    pub fn bytes(&mut self, len: usize) -> &mut [u8] {
        // SAFETY: owned, and zeroed at first.
        unsafe { std::slice::from_raw_parts_mut(self.start.cast(), len.min(self.len)) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: allocated by `new`.
        unsafe { sys::cuMemFreeHost(self.start) };
    }
}

/// Slots that take turns; one is used again when what it held has arrived.
pub struct Ring {
    slots: Vec<(Pinned, Event, bool)>,
    next: usize,
}

impl Ring {
    /// The slots of a context.
    pub fn new(context: &Context) -> Result<Self> {
        let slot = |_| Ok((Pinned::new(context, SLOT)?, Event::new(context)?, false));
        Ok(Ring { slots: (0..SLOTS).map(slot).collect::<Result<_>>()?, next: 0 })
    }

    /// Puts up to [`SLOT`] bytes into a slot, and lets `copy` start their way from its address.
    pub fn send(&mut self, context: &Context, from: &[u8], copy: impl FnOnce(*mut c_void) -> CUresult) -> Result<()> {
        let (pinned, event, used) = &mut self.slots[self.next];
        if *used {
            event.wait(context)?;
        }
        pinned.bytes(from.len()).copy_from_slice(from);
        context.check("copying to the device", copy(pinned.address()))?;
        *used = true;
        event.record(context)?;
        self.next = (self.next + 1) % SLOTS;
        Ok(())
    }
}

/// Pinned memory and events of reads that are done, for those to come.
pub type Spare = Arc<Mutex<Vec<(Pinned, Event)>>>;

/// The most of them that are kept, and the most bytes of one.
const SPARE: usize = 16;
const SPARE_BYTES: usize = 32 << 20;

/// A read under way. Its memory is not used again before it has arrived, even if nobody waits for it.
pub struct Arrival {
    context: Arc<Context>,
    parts: Option<(Pinned, Event)>,
    spare: Spare,
}

impl Arrival {
    /// Starts a read of `len` bytes: `copy` starts their way to an address.
    pub fn start(
        context: &Arc<Context>,
        spare: &Spare,
        len: usize,
        copy: impl FnOnce(*mut c_void) -> CUresult,
    ) -> Result<Self> {
        let found = {
            let mut spare = spare.lock().unwrap_or_else(PoisonError::into_inner);
            let fitting = spare.iter().position(|(pinned, _)| pinned.len >= len);
            fitting.map(|index| spare.swap_remove(index))
        };
        let (pinned, event) = match found {
            Some(parts) => parts,
            None => (Pinned::new(context, len.next_power_of_two())?, Event::new(context)?),
        };
        let address = pinned.address();
        let arrival = Arrival { context: context.clone(), parts: Some((pinned, event)), spare: spare.clone() };
        check(&context.name, "copying from the device", copy(address))?;
        if let Some((_, event)) = &arrival.parts {
            event.record(context)?;
        }
        Ok(arrival)
    }

    /// Waits for the bytes.
    pub fn finish(mut self, len: usize) -> Result<Vec<u8>> {
        let Some((pinned, event)) = &mut self.parts else { return Ok(Vec::new()) };
        event.wait(&self.context)?;
        Ok(pinned.bytes(len).to_vec())
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        let Some((pinned, event)) = self.parts.take() else { return };
        // Where the device failed nothing arrives any more.
        let _arrived = event.wait(&self.context);
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        if spare.len() < SPARE && pinned.len <= SPARE_BYTES {
            spare.push((pinned, event));
        }
    }
}
