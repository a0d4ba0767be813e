//! Buffers by id, and the windows of them that a dispatch binds.

use std::collections::HashMap;

use super::adapter::{Abilities, complete};
use crate::backend::{BufferId, DType, Error, Order, Result, View};

struct Buffer {
    raw: wgpu::Buffer,
    dtype: DType,
    len: usize,
}

/// A view as a dispatch binds it: a window of a buffer that starts where the adapter's alignment allows.
#[derive(Clone, Debug)]
pub(super) struct Window {
    pub raw: wgpu::Buffer,
    pub id: BufferId,
    /// Bytes from the start of the buffer.
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
}

impl Memory {
    pub fn new(device: &wgpu::Device, name: &str, abilities: Abilities) -> Self {
        Memory { device: device.clone(), name: name.into(), abilities, buffers: HashMap::new(), next: 0 }
    }

    /// That there is no memory for so much.
    pub fn out_of_memory(&self, what: &str, bytes: usize) -> Error {
        Error::OutOfMemory { device: self.name.clone(), what: what.into(), bytes }
    }

    /// A raw buffer of so many bytes, zeros.
    pub fn raw(&self, what: &str, bytes: u64, usage: wgpu::BufferUsages) -> Result<wgpu::Buffer> {
        let failed = || self.out_of_memory(what, usize::try_from(bytes).unwrap_or(usize::MAX));
        if bytes > self.abilities.buffer {
            return Err(failed());
        }
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
        let raw = self.raw(what, bytes as u64, usage)?;
        let id = BufferId(self.next);
        self.next += 1;
        self.buffers.insert(id, Buffer { raw, dtype, len });
        Ok(id)
    }

    /// Gives a buffer back; the device keeps it until its commands are done.
    pub fn free(&mut self, id: BufferId) {
        self.buffers.remove(&id);
    }

    /// The buffer of a view that lies in it, without two rows on one value.
    pub fn buffer(&self, view: View) -> Result<&wgpu::Buffer> {
        let span = view.span();
        let rows_apart = match view.order {
            Order::Rows => view.rows <= 1 || view.stride >= view.cols,
            Order::Weight => view.stride == view.cols,
        };
        let lies =
            |buffer: &&Buffer| buffer.dtype == view.dtype && rows_apart && (view.is_empty() || span.end <= buffer.len);
        let found = self.buffers.get(&view.buffer).filter(lies).map(|buffer| &buffer.raw);
        found.ok_or(Error::Memory { buffer: view.buffer, dtype: view.dtype, first: span.start, end: span.end })
    }

    /// The window that shows a view.
    pub fn window(&self, op: &'static str, view: View) -> Result<Window> {
        let raw = self.buffer(view)?.clone();
        let (span, size) = (view.span(), view.dtype.size() as u64);
        if view.is_empty() {
            return Ok(Window { raw, id: view.buffer, start: 0, size: 16, first: 0, stride: 0 });
        }
        let (first, end) = (span.start as u64 * size, (span.end as u64 * size).next_multiple_of(4));
        let start = first / self.abilities.alignment.0 * self.abilities.alignment.0;
        let narrow = |value: u64| u32::try_from(value).ok();
        let within = end - start <= self.abilities.binding;
        match (narrow((first - start) / size), narrow(view.stride as u64), narrow(end / size - start / size)) {
            (Some(first), Some(stride), Some(_)) if within => {
                Ok(Window { raw, id: view.buffer, start, size: end - start, first, stride })
            }
            _ => Err(Error::Unsupported {
                backend: "wgpu",
                op,
                what: format!(
                    "a view of [{}, {}] {} spans {} bytes, and {} binds {} at most",
                    view.rows,
                    view.cols,
                    view.dtype,
                    end - start,
                    self.name,
                    self.abilities.binding
                ),
            }),
        }
    }
}
