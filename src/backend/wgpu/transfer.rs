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
        let raw = self.memory.buffer(dst)?.clone();
        if dst.is_empty() {
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
                self.half_word(&raw, offset, first)?;
                (offset, run) = (offset + 2, rest);
            }
            let (words, last) = run.split_at(run.len() / 4 * 4);
            for (part, values) in words.chunks(PART).enumerate() {
                self.recorder.write(&raw, (offset + part * PART) as u64, values);
            }
            if !last.is_empty() {
                self.half_word(&raw, offset + words.len(), last)?;
            }
        }
        Ok(())
    }

    /// Two bytes inside a word whose other half stays.
    fn half_word(&mut self, raw: &wgpu::Buffer, offset: usize, half: &[u8]) -> Result<()> {
        let word = offset / 4 * 4;
        let mut bytes = self.start(raw, word as u64, 4)?.bytes()?;
        bytes[offset - word..][..half.len()].copy_from_slice(half);
        self.recorder.write(raw, word as u64, &bytes);
        Ok(())
    }

    /// Starts to read bytes; offset and length are multiples of 4.
    fn start(&mut self, raw: &wgpu::Buffer, offset: u64, len: u64) -> Result<Reading> {
        let large_enough = |stage: &wgpu::Buffer| stage.size() >= len;
        let mut kept = self.stages.lock().unwrap_or_else(PoisonError::into_inner);
        let stage = kept.iter().position(large_enough).map(|i| kept.swap_remove(i));
        drop(kept);
        let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
        let stage = stage.map_or_else(|| self.memory.raw("values to read", len.next_power_of_two(), usage), Ok)?;
        self.recorder.copy((raw, offset), (&stage, 0), len);
        self.recorder.submit();
        let (done, mapped) = mpsc::channel();
        stage.slice(..len).map_async(wgpu::MapMode::Read, move |result| {
            // Nobody listens where the reader was dropped.
            let _ = done.send(result.is_ok());
        });
        Ok(Reading {
            device: self.device.clone(),
            name: self.name.clone(),
            failure: self.failure.clone(),
            submission: self.recorder.last(),
            stage,
            len,
            mapped,
            stages: self.stages.clone(),
        })
    }

    /// Starts to read the values of a view, row-major.
    pub fn read(&mut self, src: View) -> Result<Readback> {
        let raw = self.memory.buffer(src)?.clone();
        if src.is_empty() {
            return Ok(Readback::new(|| Ok(Vec::new())));
        }
        let (span, size) = (src.span(), src.dtype.size());
        let (first, end) = (span.start * size / 4 * 4, (span.end * size).next_multiple_of(4));
        let reading = self.start(&raw, first as u64, (end - first) as u64)?;
        Ok(Readback::new(move || {
            let bytes = reading.bytes()?;
            let start = span.start * size - first;
            let rows = (0..src.rows).map(|row| &bytes[start + row * src.stride * size..][..src.cols * size]);
            Ok(rows.flat_map(|row| row.chunks_exact(size).map(|value| decode(value, src.dtype))).collect())
        }))
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

/// A read under way.
struct Reading {
    device: wgpu::Device,
    name: String,
    failure: super::adapter::Failure,
    submission: Option<wgpu::SubmissionIndex>,
    stage: wgpu::Buffer,
    len: u64,
    mapped: mpsc::Receiver<bool>,
    stages: Stages,
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
        if !self.mapped.recv().unwrap_or(false) {
            return Err(failed("the device gave no values".into()));
        }
        let bytes = match self.stage.slice(..self.len).get_mapped_range() {
            Ok(range) => range.to_vec(),
            Err(error) => return Err(failed(error.to_string())),
        };
        self.stage.unmap();
        self.stages.lock().unwrap_or_else(PoisonError::into_inner).push(self.stage);
        Ok(bytes)
    }
}
