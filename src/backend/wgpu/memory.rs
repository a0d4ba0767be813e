//! Buffers by id, and the windows of them that a dispatch binds.

use std::collections::HashMap;
use std::ops::Range;

use super::adapter::{Abilities, complete};
use super::call::flat;
use crate::backend::{BufferId, DType, Error, Order, Result, View};

/// A buffer in as many parts as the adapter's limit makes of it, all but the last of `Abilities::buffer` bytes.
struct Buffer {
    parts: Vec<wgpu::Buffer>,
    dtype: DType,
    len: usize,
}

/// Parts of a buffer at most: more than any device has memory for.
const MOST_PARTS: u64 = 256;

/// A view as a dispatch binds it: a window of a buffer that starts where the adapter's alignment allows.
#[derive(Clone, Debug)]
pub(super) struct Window {
    /// The part that it lies in.
    pub raw: wgpu::Buffer,
    pub id: BufferId,
    /// Bytes from the start of the buffer, and of the part.
    pub place: u64,
    pub start: u64,
    /// Bytes, a multiple of 4.
    pub size: u64,
    /// The view's first value, from the start of the window.
    pub first: u32,
    /// Values from one row to the next.
    pub stride: u32,
}

/// The buffers of a device.
pub(super) struct Memory {
    device: wgpu::Device,
    name: String,
    abilities: Abilities,
    buffers: HashMap<BufferId, Buffer>,
    next: u64,
    /// Whether new buffers have no memory: nothing is done with them.
    pub planning: bool,
}

impl Memory {
    pub fn new(device: &wgpu::Device, name: &str, abilities: Abilities) -> Self {
        Memory {
            device: device.clone(),
            name: name.into(),
            abilities,
            buffers: HashMap::new(),
            next: 0,
            planning: false,
        }
    }

    /// That there is no memory for so much.
    pub fn out_of_memory(&self, what: &str, bytes: usize) -> Error {
        Error::OutOfMemory { device: self.name.clone(), what: what.into(), bytes }
    }

    /// A raw buffer of so many bytes, zeros.
    pub fn raw(&self, what: &str, bytes: u64, usage: wgpu::BufferUsages) -> Result<wgpu::Buffer> {
        let failed = || self.out_of_memory(what, usize::try_from(bytes).unwrap_or(usize::MAX));
        let scopes = [wgpu::ErrorFilter::OutOfMemory, wgpu::ErrorFilter::Internal, wgpu::ErrorFilter::Validation];
        let scopes = scopes.map(|filter| self.device.push_error_scope(filter));
        let descriptor = wgpu::BufferDescriptor { label: Some(what), size: bytes, usage, mapped_at_creation: false };
        let buffer = self.device.create_buffer(&descriptor);
        // Scopes close in the reverse of the order in which they were opened.
        let mut error = None;
        for scope in scopes.into_iter().rev() {
            error = complete(scope.pop()).or(error);
        }
        match error {
            None => Ok(buffer),
            Some(_) => Err(failed()),
        }
    }

    /// A buffer of `len` zeros.
    pub fn alloc(&mut self, what: &str, dtype: DType, len: usize) -> Result<BufferId> {
        let bytes = len.checked_mul(dtype.size()).and_then(|bytes| bytes.checked_next_multiple_of(16));
        let bytes = bytes.ok_or_else(|| self.out_of_memory(what, usize::MAX))?.max(16);
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        let (mut parts, mut left) = (Vec::new(), if self.planning { 0 } else { bytes as u64 });
        if left.div_ceil(self.abilities.buffer) > MOST_PARTS {
            return Err(self.out_of_memory(what, bytes));
        }
        while left > 0 {
            let size = left.min(self.abilities.buffer);
            // What is missing is the whole, not the part that found no room.
            parts.push(self.raw(what, size, usage).map_err(|_| self.out_of_memory(what, bytes))?);
            left -= size;
        }
        let id = BufferId(self.next);
        self.next += 1;
        self.buffers.insert(id, Buffer { parts, dtype, len });
        Ok(id)
    }

    /// Gives a buffer back; the device keeps it until its commands are done.
    pub fn free(&mut self, id: BufferId) {
        self.buffers.remove(&id);
    }

    fn buffer(&self, view: View) -> Result<&Buffer> {
        let span = view.span();
        let rows_apart = match view.order {
            Order::Rows => view.rows <= 1 || view.stride >= view.cols,
            Order::Weight => view.stride == view.cols,
        };
        let lies =
            |buffer: &&Buffer| buffer.dtype == view.dtype && rows_apart && (view.is_empty() || span.end <= buffer.len);
        let found = self.buffers.get(&view.buffer).filter(lies);
        found.ok_or(Error::Memory { buffer: view.buffer, dtype: view.dtype, first: span.start, end: span.end })
    }

    /// That a view lies in its buffer, without two rows on one value.
    pub fn check(&self, view: View) -> Result<()> {
        self.buffer(view).map(drop)
    }

    /// Bytes of a view's buffer part by part, at most `most` at a time: where they lie, from the start of the part, and how
    /// many they are.
    pub fn runs(&self, view: View, bytes: Range<usize>, most: usize) -> Result<Vec<(wgpu::Buffer, u64, usize)>> {
        let buffer = self.buffer(view)?;
        let part = usize::try_from(self.abilities.buffer).unwrap_or(usize::MAX);
        let (mut runs, mut at) = (Vec::new(), bytes.start);
        while at < bytes.end {
            let within = at % part;
            let count = (bytes.end - at).min(part - within).min(most);
            let Some(raw) = buffer.parts.get(at / part) else { break };
            runs.push((raw.clone(), within as u64, count));
            at += count;
        }
        Ok(runs)
    }

    /// The window that shows a view; `None` where it would be larger than a binding, or where the view lies in two parts.
    pub fn window(&self, view: View) -> Result<Option<Window>> {
        let buffer = self.buffer(view)?;
        let (id, span, size) = (view.buffer, view.span(), view.dtype.size() as u64);
        if view.is_empty() {
            let raw = buffer.parts.first().cloned();
            return Ok(raw.map(|raw| Window { raw, id, place: 0, start: 0, size: 16, first: 0, stride: 0 }));
        }
        let (first, end) = (span.start as u64 * size, (span.end as u64 * size).next_multiple_of(4));
        let place = first / self.abilities.alignment.0 * self.abilities.alignment.0;
        let part = place / self.abilities.buffer;
        let shown = (end - 1) / self.abilities.buffer == part && end - place <= self.abilities.binding;
        let narrow = |value: u64| u32::try_from(value).ok();
        let numbers = narrow((first - place) / size)
            .zip(narrow(view.stride as u64))
            .filter(|_| end / size - place / size <= COUNTED);
        let raw = usize::try_from(part).ok().and_then(|part| buffer.parts.get(part));
        Ok(numbers.zip(raw).filter(|_| shown).map(|((first, stride), raw)| Window {
            raw: raw.clone(),
            id,
            place,
            start: place - part * self.abilities.buffer,
            size: end - place,
            first,
            stride,
        }))
    }

    /// Values of a dtype that a binding can show, wherever they start.
    pub fn shown(&self, dtype: DType) -> usize {
        // A window may start a whole alignment before its view.
        let bytes = self.abilities.binding.saturating_sub(self.abilities.alignment.0 + 4);
        (usize::try_from(bytes).unwrap_or(usize::MAX) / dtype.size()).min(COUNTED as usize / 2)
    }

    /// Values of a view's buffer from one of them to the end of the part that it lies in.
    pub fn rest_of_part(&self, dtype: DType, value: usize) -> usize {
        let part = usize::try_from(self.abilities.buffer).unwrap_or(usize::MAX) / dtype.size();
        part - value % part
    }

    /// Whole rows of a view from `first` on that lie in the same part of its buffer.
    pub fn rows_of_part(&self, view: View, first: usize) -> usize {
        let rest = self.rest_of_part(view.dtype, view.offset.saturating_add(first.saturating_mul(view.stride)));
        rest.checked_sub(view.cols).map_or(0, |rest| rest / view.stride.max(1) + 1)
    }

    /// A matrix cut into matrices that windows can show, each with the row and the column where it starts.
    pub fn pieces(&self, view: View) -> Result<Vec<(usize, usize, View)>> {
        let (mut pieces, mut row, mut col) = (Vec::new(), 0, 0);
        while row < view.rows && view.cols > 0 {
            let rest = view.row_range(row, view.rows - row)?;
            let room = self.rest_of_part(view.dtype, rest.offset + col).min(self.shown(view.dtype));
            let rows = (room.saturating_sub(view.cols) / view.stride.max(1) + 1).min(rest.rows);
            let (rows, cols) = match col {
                0 if room >= view.cols => (rows, view.cols),
                _ => (1, room.min(view.cols - col)),
            };
            pieces.push((row, col, rest.row_range(0, rows)?.col_range(col, cols)?));
            if col + cols < view.cols {
                col += cols;
            } else {
                (row, col) = (row + rows, 0);
            }
        }
        Ok(pieces)
    }

    /// That a binding cannot show a view.
    pub fn too_large(&self, op: &'static str, view: View) -> Error {
        let bytes = flat(view).unwrap_or(view).len().saturating_mul(view.dtype.size());
        let View { rows, cols, dtype, .. } = view;
        let Abilities { binding, .. } = self.abilities;
        let what =
            format!("a view of [{rows}, {cols}] {dtype} is {bytes} bytes, and {} binds {binding} at most", self.name);
        Error::Unsupported { backend: "wgpu", op, what }
    }
}

/// Values that a shader counts at most.
const COUNTED: u64 = u32::MAX as u64;
