//! Values from the host and to it.

use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};

use half::{bf16, f16};

use super::Gpu;
use crate::backend::{DType, Error, HostSlice, Order, Readback, Result, View, padded_rows};

/// Bytes that are written at a time.
const PART: usize = 1 << 26;

/// Buffers that the host can read, kept for the next read.
pub(super) type Stages = Arc<Mutex<Vec<wgpu::Buffer>>>;

/// The bytes of host values in a dtype.
fn bytes(src: HostSlice<'_>, dtype: DType) -> Vec<u8> {
    fn each<T: bytemuck::NoUninit>(values: impl Iterator<Item = T>) -> Vec<u8> {
        let values: Vec<T> = values.collect();
        bytemuck::cast_slice(&values).to_vec()
    }
    match (src, dtype) {
        (HostSlice::F32(v), DType::F16) => each(v.iter().map(|x| f16::from_f32(*x))),
        (HostSlice::Bf16(v), DType::F16) => each(v.iter().map(|x| f16::from_f32(x.to_f32()))),
        (HostSlice::F16(v), DType::F16) => each(v.iter().copied()),
        (HostSlice::U32(v), _) => each(v.iter().copied()),
        (HostSlice::F32(v), _) => each(v.iter().copied()),
        (HostSlice::Bf16(v), _) => each(v.iter().map(|x: &bf16| x.to_f32())),
        (HostSlice::F16(v), _) => each(v.iter().map(|x| x.to_f32())),
    }
}

impl Gpu {
    /// Row-major values of the host into a view; the padding of a weight becomes 0.
    pub fn write(&mut self, src: HostSlice<'_>, dst: View) -> Result<()> {
        self.memory.check(dst)?;
        if dst.is_empty() || self.plan.is_some() {
            return Ok(());
        }
        let (size, row) = (dst.dtype.size(), dst.cols * dst.dtype.size());
        let mut bytes = bytes(src, dst.dtype);
        if dst.order == Order::Weight {
            bytes.resize(padded_rows(dst.rows) * row, 0);
        }
        let contiguous = dst.rows == 1 || dst.stride == dst.cols;
        let (run, stride) = if contiguous { (bytes.len(), bytes.len()) } else { (row, dst.stride * size) };
        for (i, run) in bytes.chunks(run).enumerate() {
            let mut offset = dst.offset * size + i * stride;
            let mut run = run;
            // A queue writes whole words: a half value at either end goes with its neighbour.
            if !offset.is_multiple_of(4) {
                let (first, rest) = run.split_at(2.min(run.len()));
                self.half_word(dst, offset, first)?;
                (offset, run) = (offset + 2, rest);
            }
            let (words, last) = run.split_at(run.len() / 4 * 4);
            self.write_words(dst, offset, words)?;
            if !last.is_empty() {
                self.half_word(dst, offset + words.len(), last)?;
            }
        }
        Ok(())
    }

    /// Whole words into the buffer of a view, `offset` bytes from its start.
    fn write_words(&mut self, dst: View, offset: usize, mut words: &[u8]) -> Result<()> {
        for (raw, start, count) in self.memory.runs(dst, offset..offset + words.len(), PART)? {
            let (run, rest) = words.split_at(count);
            self.recorder.write(&raw, start, run);
            words = rest;
        }
        Ok(())
    }

    /// Two bytes inside a word whose other half stays.
    fn half_word(&mut self, dst: View, offset: usize, half: &[u8]) -> Result<()> {
        let word = offset / 4 * 4;
        let mut bytes = self.start(dst, word, word + 4)?.bytes()?;
        bytes[offset - word..][..half.len()].copy_from_slice(half);
        self.write_words(dst, word, &bytes)
    }

    /// Starts to read bytes `first..end` of the buffer of a view, multiples of 4.
    fn start(&mut self, src: View, first: usize, end: usize) -> Result<Reading> {
        let runs = self.memory.runs(src, first..end, usize::MAX)?;
        self.start_runs(runs)
    }

    /// Starts to read bytes of raw buffers.
    fn start_runs(&mut self, runs: Vec<(wgpu::Buffer, u64, usize)>) -> Result<Reading> {
        let mut stages = Vec::new();
        for (raw, start, count) in runs {
            let stage = self.stage(count as u64)?;
            self.recorder.copy((&raw, start), (&stage, 0), count as u64);
            stages.push((stage, count as u64));
        }
        self.recorder.submit();
        let stages = stages.into_iter().map(|(stage, len)| {
            let (done, mapped) = mpsc::channel();
            stage.slice(..len).map_async(wgpu::MapMode::Read, move |result| {
                // Nobody listens where the reader was dropped.
                let _ = done.send(result.is_ok());
            });
            Stage { raw: stage, len, mapped }
        });
        Ok(Reading {
            stages: stages.collect(),
            device: self.device.clone(),
            name: self.name.clone(),
            failure: self.failure.clone(),
            submission: self.recorder.last(),
            kept: self.stages.clone(),
        })
    }

    /// A buffer of at least so many bytes that the host can read: one that was kept, or a new one.
    fn stage(&self, len: u64) -> Result<wgpu::Buffer> {
        let mut kept = self.stages.lock().unwrap_or_else(PoisonError::into_inner);
        let found = kept.iter().position(|stage| stage.size() >= len).map(|i| kept.swap_remove(i));
        drop(kept);
        let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
        let bytes = len.next_power_of_two().min(self.abilities.buffer);
        found.map_or_else(|| self.memory.raw("values to read", bytes, usage), Ok)
    }

    /// Starts to read the values of a view, row-major.
    pub fn read(&mut self, src: View) -> Result<Readback> {
        self.memory.check(src)?;
        if src.is_empty() || self.plan.is_some() {
            return Ok(Readback::new(move || Ok(vec![0.0; src.len()])));
        }
        let (span, size) = (src.span(), src.dtype.size());
        let (first, end) = (span.start * size / 4 * 4, (span.end * size).next_multiple_of(4));
        let reading = self.start(src, first, end)?;
        Ok(Readback::new(move || {
            let bytes = reading.bytes()?;
            let start = span.start * size - first;
            let rows = (0..src.rows).map(|row| &bytes[start + row * src.stride * size..][..src.cols * size]);
            Ok(rows.flat_map(|row| row.chunks_exact(size).map(|value| decode(value, src.dtype))).collect())
        }))
    }
}

impl Gpu {
    /// Stops the recorder's clock; seconds since its start.
    pub fn stop_clock(&mut self) -> Result<f64> {
        let Some((ticks, nanoseconds)) = self.recorder.stop_clock() else {
            return Err(self.failed("clock", "the device gives no times".into()));
        };
        let bytes = self.start_runs(vec![(ticks, 0, 16)])?.bytes()?;
        let (words, _) = bytes.as_chunks::<8>();
        let [start, end] = [0, 1].map(|i| words.get(i).copied().map_or(0, u64::from_le_bytes));
        Ok(end.saturating_sub(start) as f64 * f64::from(nanoseconds) * 1e-9)
    }
}

fn decode(value: &[u8], dtype: DType) -> f32 {
    match (value, dtype) {
        (&[a, b], _) => f16::from_le_bytes([a, b]).to_f32(),
        (&[a, b, c, d], DType::U32) => u32::from_le_bytes([a, b, c, d]) as f32,
        (&[a, b, c, d], _) => f32::from_le_bytes([a, b, c, d]),
        _ => 0.0,
    }
}

/// A buffer that the host waits for.
struct Stage {
    raw: wgpu::Buffer,
    len: u64,
    mapped: mpsc::Receiver<bool>,
}

/// A read under way: stages with the values one after the other.
struct Reading {
    stages: Vec<Stage>,
    device: wgpu::Device,
    name: String,
    failure: super::adapter::Failure,
    submission: Option<wgpu::SubmissionIndex>,
    kept: Stages,
}

impl Reading {
    /// Waits for the bytes.
    fn bytes(self) -> Result<Vec<u8>> {
        let failed = |why: String| Error::Failed { device: self.name.clone(), what: "read".into(), why };
        let wait = self.device.poll(wgpu::PollType::Wait { submission_index: self.submission.clone(), timeout: None });
        if let Some(what) = self.failure.get() {
            return Err(failed(what));
        }
        wait.map_err(|error| failed(error.to_string()))?;
        let mut bytes = Vec::with_capacity(self.stages.iter().map(|stage| stage.len as usize).sum());
        for Stage { raw, len, mapped } in self.stages {
            if !mapped.recv().unwrap_or(false) {
                return Err(failed("the device gave no values".into()));
            }
            match raw.slice(..len).get_mapped_range() {
                Ok(range) => bytes.extend_from_slice(&range),
                Err(error) => return Err(failed(error.to_string())),
            }
            raw.unmap();
            self.kept.lock().unwrap_or_else(PoisonError::into_inner).push(raw);
        }
        Ok(bytes)
    }
}
