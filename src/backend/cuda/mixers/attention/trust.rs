//! The kernels for an H100 are trusted only after they agreed with those for all cards on that very card: a short check at
//! first use, remembered beside their code.

use super::{Backward, Forward, Pages, backward, forward, wgmma};
use crate::backend::cuda::call::{Call, Place, SegmentsPlace};
use crate::backend::cuda::driver::{Driver, Pointer, Region};
use crate::backend::cuda::source::ModuleKey;
use crate::backend::cuda::{bytes_of, values_of};
use crate::backend::{DType, HostSlice, Result, ops};

/// What is remembered of a module that agreed.
pub(in crate::backend::cuda) const AGREES: &[u8] = b"agrees";

/// Tokens and past of the segments: several tiles of queries a block, more tiles of keys than a ring has slots.
const SEGMENTS: [(usize, usize); 2] = [(130, 520), (40, 0)];
const HEADS: usize = 3;
/// Keys of a page, where they are in pages.
const PAGE: usize = 64;
/// The share of a row's length by which two 16-bit results may differ; a wrong layout gives about 1.
const TOLERANCE: f32 = 0.04;

/// Whether the kernels that this call would take gave what those for all cards give.
pub(super) fn forward_agrees(c: &mut Call, call: &Forward) -> bool {
    let (dtype, head_dim, paged) = (call.q.dtype, call.shape.head_dim, call.pages.is_some());
    agrees(c, wgmma::forward_module(call.q.of(), head_dim, paged), |c| check_forward(c, dtype, head_dim, paged))
}

/// As [`forward_agrees`], for the gradients.
pub(super) fn backward_agrees(c: &mut Call, call: &Backward) -> bool {
    let (dtype, head_dim) = (call.q.dtype, call.shape.head_dim);
    agrees(c, wgmma::backward_module(call.q.of(), head_dim), |c| check_backward(c, dtype, head_dim))
}

fn agrees(c: &mut Call, module: ModuleKey, check: impl FnOnce(&mut Call) -> Result<Option<&'static str>>) -> bool {
    if let Some(&known) = c.state.trusted.get(&module) {
        return known;
    }
    let remembered = c.driver.recall(&module).is_some_and(|value| value == AGREES);
    let differs = if remembered {
        None
    } else {
        match check(c) {
            Ok(None) => {
                c.driver.remember(&module, AGREES);
                None
            }
            Ok(Some(what)) => Some(format!("gives another {what} than the one for all cards")),
            Err(error) => Some(format!("cannot run ({error})")),
        }
    };
    if let Some(why) = &differs {
        eprintln!("cuda: {module} on {} {why}, so that the one for all cards is taken", c.limits().name);
    }
    c.state.trusted.insert(module, differs.is_none());
    differs.is_none()
}

/// Device memory of a check, freed with it.
struct Memory<'d> {
    driver: &'d dyn Driver,
    blocks: Vec<Pointer>,
    seed: u64,
}

impl Memory<'_> {
    /// Rows of a dtype, 0.
    fn place(&mut self, dtype: DType, rows: usize, cols: usize) -> Result<Place> {
        let start = self.driver.allocate(rows * cols * dtype.size(), "a check of kernels")?;
        self.blocks.push(start);
        Ok(Place { start, dtype, rows, cols, stride: cols })
    }

    /// Rows of numbers between -1 and 1 that are the same in every run.
    fn numbers(&mut self, dtype: DType, rows: usize, cols: usize) -> Result<Place> {
        let place = self.place(dtype, rows, cols)?;
        let mut number = || {
            self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.seed >> 40) as f32 / (1u32 << 23) as f32 - 1.0
        };
        let values: Vec<f32> = (0..rows * cols).map(|_| number()).collect();
        self.driver.upload(&bytes_of(HostSlice::F32(&values), dtype), place.region())?;
        Ok(place)
    }

    fn segments(&mut self) -> Result<SegmentsPlace> {
        let (mut start, mut keys) = (0, 0);
        let rows = SEGMENTS.iter().zip(0..).map(|(&(len, past), slot)| {
            let row = [start, len as u32, past as u32, slot, keys];
            (start, keys) = (start + row[1], keys + row[2] + row[1]);
            row
        });
        let table: Vec<u8> = rows.flatten().flat_map(u32::to_ne_bytes).collect();
        let place = self.place(DType::U32, SEGMENTS.len(), table.len() / 4 / SEGMENTS.len())?;
        self.driver.upload(&table, place.region())?;
        Ok(SegmentsPlace { table: place.start, capacity: SEGMENTS.len() })
    }

    /// Pages for the keys of the segments, none where it would be if they were one after the other; and how many there are.
    fn pages(&mut self) -> Result<(Pages, usize)> {
        let counts = SEGMENTS.map(|(len, past)| (len + past).div_ceil(PAGE));
        let (all, a_slot) = (counts.iter().sum(), counts.into_iter().max().unwrap_or(0));
        let mut table = Vec::new();
        let mut free = (0..all as u32).rev();
        for count in counts {
            table.extend(free.by_ref().take(count));
            table.resize(table.len() + a_slot - count, u32::MAX);
        }
        let place = self.place(DType::U32, SEGMENTS.len(), a_slot)?;
        self.driver.upload(&table.iter().flat_map(|page| page.to_ne_bytes()).collect::<Vec<_>>(), place.region())?;
        Ok((Pages { table: place.start, slots: SEGMENTS.len(), a_slot, page_size: PAGE }, all))
    }

    /// Whether two matrices differ, row by row.
    fn differ(&self, [a, b]: [&Place; 2]) -> Result<bool> {
        let read = |place: &Place| -> Result<Vec<f32>> {
            let region: Region = place.region();
            Ok(values_of(&self.driver.download(region)?()?, place.dtype))
        };
        let length = |row: &[f32]| row.iter().map(|x| x * x).sum::<f32>().sqrt();
        let [a_values, b_values] = [read(a)?, read(b)?];
        // Rows of gradients whose terms cancel hold rounding alone: what they lack of an average row is allowed for.
        let average = b_values.chunks(b.cols).map(length).sum::<f32>() / b.rows as f32;
        let near = |(a, b): (&[f32], &[f32])| {
            let apart: Vec<f32> = a.iter().zip(b).map(|(a, b)| a - b).collect();
            length(&apart) <= TOLERANCE * length(b).max(average)
        };
        // An average that is no number is no agreement either.
        Ok(average.is_nan() || average == 0.0 || !a_values.chunks(a.cols).zip(b_values.chunks(b.cols)).all(near))
    }

    /// The name of the first output that differs.
    fn first_difference<const N: usize>(
        &self,
        names: [&'static str; N],
        found: [Place; N],
        expected: [Place; N],
    ) -> Result<Option<&'static str>> {
        for (name, (found, expected)) in names.into_iter().zip(found.iter().zip(&expected)) {
            if self.differ([found, expected])? {
                return Ok(Some(name));
            }
        }
        Ok(None)
    }
}

impl Drop for Memory<'_> {
    fn drop(&mut self) {
        self.blocks.iter().for_each(|&start| self.driver.free(start));
    }
}

fn shape(head_dim: usize) -> ops::AttentionShape {
    let scale = (head_dim as f32).sqrt().recip();
    // Scores of some size, so that a wrong one is seen.
    ops::AttentionShape { heads: HEADS, kv_heads: 1, head_dim, scale: 3.0 * scale, window: None }
}

/// A forward call on numbers of its own, and its log-sum-exp.
fn forward_call(memory: &mut Memory, dtype: DType, head_dim: usize, paged: bool) -> Result<(Forward, Place)> {
    let (tokens, keys) = SEGMENTS.iter().fold((0, 0), |(tokens, keys), (len, past)| (tokens + len, keys + len + past));
    let pages = paged.then(|| memory.pages()).transpose()?;
    let keys = pages.map_or(keys, |(_, count)| count * PAGE);
    let lse = memory.place(DType::F32, tokens, HEADS)?;
    let call = Forward {
        shape: shape(head_dim),
        q: memory.numbers(dtype, tokens, HEADS * head_dim)?,
        k: memory.numbers(dtype, keys, head_dim)?,
        v: memory.numbers(dtype, keys, head_dim)?,
        pages: pages.map(|(pages, _)| pages),
        segments: memory.segments()?,
        out: memory.place(dtype, tokens, HEADS * head_dim)?,
        lse: Some(lse),
    };
    Ok((call, lse))
}

/// The first output in which the two kernels differ.
fn check_forward(c: &mut Call, dtype: DType, head_dim: usize, paged: bool) -> Result<Option<&'static str>> {
    let mut memory = Memory { driver: c.driver, blocks: Vec::new(), seed: 1 };
    let (mut call, lse) = forward_call(&mut memory, dtype, head_dim, paged)?;
    forward(c, &call)?;
    let expected = [call.out, lse];
    let found = [memory.place(dtype, lse.rows, call.out.cols)?, memory.place(DType::F32, lse.rows, lse.cols)?];
    (call.out, call.lse) = (found[0], Some(found[1]));
    wgmma::forward(c, &call)?;
    memory.first_difference(["output", "log-sum-exp"], found, expected)
}

/// As [`check_forward`], for the gradients.
fn check_backward(c: &mut Call, dtype: DType, head_dim: usize) -> Result<Option<&'static str>> {
    let mut memory = Memory { driver: c.driver, blocks: Vec::new(), seed: 2 };
    let (done, lse) = forward_call(&mut memory, dtype, head_dim, false)?;
    forward(c, &done)?;
    let Forward { shape, q, k, v, segments, out, .. } = done;
    let dout = memory.numbers(dtype, q.rows, q.cols)?;
    let mut gradients = || -> Result<[Place; 3]> {
        let mut of = |place: &Place| memory.place(dtype, place.rows, place.cols);
        Ok([of(&q)?, of(&k)?, of(&v)?])
    };
    let (expected, found) = (gradients()?, gradients()?);
    for (on_h100, [dq, dk, dv]) in [(false, expected), (true, found)] {
        backward(c, &Backward { shape, q, k, v, segments, out, lse, dout, dq, dk, dv }, on_h100)?;
    }
    memory.first_difference(["dq", "dk", "dv"], found, expected)
}

#[cfg(test)]
#[cfg(unix)]
mod tests {
    use super::*;
    use crate::backend::cuda::driver::{Arguments, Boxes, Finish, Graph, Kernel, Limits, Product, Shape, TensorMap};
    use crate::backend::cuda::emulated::{self, Emulated, Emulation};
    use crate::backend::cuda::source::KernelKey;
    use crate::backend::{Device, Segments};
    use std::sync::Mutex;

    /// The emulated card, whose kernels for an H100 may do nothing, and which counts their launches and what it remembers.
    struct Card {
        inner: Emulated,
        broken: bool,
        memory: &'static Mutex<Seen>,
    }

    #[derive(Default)]
    struct Seen {
        on_h100: Vec<Kernel>,
        launches: usize,
        remembered: Vec<ModuleKey>,
    }

    impl Driver for Card {
        fn limits(&self) -> &Limits {
            self.inner.limits()
        }
        fn allocate(&self, bytes: usize, what: &str) -> Result<Pointer> {
            self.inner.allocate(bytes, what)
        }
        fn free(&self, start: Pointer) {
            self.inner.free(start);
        }
        fn clear(&self, region: Region) -> Result<()> {
            self.inner.clear(region)
        }
        fn upload(&self, from: &[u8], to: Region) -> Result<()> {
            self.inner.upload(from, to)
        }
        fn download(&self, from: Region) -> Result<Finish> {
            self.inner.download(from)
        }
        fn load(&self, key: &KernelKey) -> Result<Kernel> {
            let kernel = self.inner.load(key)?;
            if key.entry.ends_with("wgmma") {
                self.memory.lock().unwrap().on_h100.push(kernel);
            }
            Ok(kernel)
        }
        fn recall(&self, module: &ModuleKey) -> Option<Vec<u8>> {
            self.memory.lock().unwrap().remembered.contains(module).then(|| AGREES.to_vec())
        }
        fn remember(&self, module: &ModuleKey, value: &[u8]) {
            assert_eq!(value, AGREES);
            self.memory.lock().unwrap().remembered.push(module.clone());
        }
        fn tensor_map(&self, boxes: &Boxes) -> Result<TensorMap> {
            self.inner.tensor_map(boxes)
        }
        fn launch(&self, kernel: Kernel, shape: Shape, arguments: &Arguments) -> Result<()> {
            let mut seen = self.memory.lock().unwrap();
            let on_h100 = seen.on_h100.contains(&kernel);
            seen.launches += usize::from(on_h100);
            drop(seen);
            if on_h100 && self.broken { Ok(()) } else { self.inner.launch(kernel, shape, arguments) }
        }
        fn product(&self, product: &Product) -> Result<()> {
            self.inner.product(product)
        }
        fn begin_recording(&self) -> Result<()> {
            self.inner.begin_recording()
        }
        fn end_recording(&self) -> Result<Graph> {
            self.inner.end_recording()
        }
        fn replay(&self, graph: Graph) -> Result<()> {
            self.inner.replay(graph)
        }
        fn forget(&self, graph: Graph) {
            self.inner.forget(graph);
        }
        fn synchronise(&self) -> Result<()> {
            self.inner.synchronise()
        }
    }

    fn card(broken: bool, memory: &'static Mutex<Seen>) -> Device {
        let folder = std::env::temp_dir().join("h1-emulated");
        let emulation = Emulation { folder, order: 0, capability: (9, 0), sanitize: false, rough: false };
        crate::backend::cuda::over(Box::new(Card { inner: emulated::driver(emulation).unwrap(), broken, memory }))
    }

    /// Forward and backward of one sequence in bf16 on a device; gives `out`, `dq`.
    fn run(device: &Device) -> [Vec<f32>; 2] {
        let (tokens, shape) = (40, shape(64));
        let numbers = |seed: usize, cols: usize| {
            let buffer = device.alloc(DType::Bf16, tokens, cols).unwrap();
            let values: Vec<f32> =
                (0..tokens * cols).map(|i| ((i * 37 + seed * 11) % 101) as f32 / 50.0 - 1.0).collect();
            device.write(HostSlice::F32(&values), buffer.view()).unwrap();
            buffer
        };
        let (q, k, v, dout) = (numbers(1, shape.q_cols()), numbers(2, 64), numbers(3, 64), numbers(4, shape.q_cols()));
        let (out, dq, dk, dv) =
            (numbers(5, shape.q_cols()), numbers(6, shape.q_cols()), numbers(7, 64), numbers(8, 64));
        let lse = device.alloc(DType::F32, tokens, HEADS).unwrap();
        let mut segments = device.alloc_segments(1, tokens).unwrap();
        let segments = segments.write(device, &Segments::documents([tokens]).unwrap()).unwrap();
        let keys = ops::Keys::Rows { k: k.view(), v: v.view() };
        let [q, k, v, out, dout, dq, dk, dv] = [&q, &k, &v, &out, &dout, &dq, &dk, &dv].map(|buffer| buffer.view());
        let attention = ops::Attention { shape, q, keys, segments, out, lse: Some(lse.view()) };
        device.attention(&attention).unwrap();
        let lse = lse.view();
        let gradients = ops::AttentionBackward { shape, q, k, v, segments, out, lse, dout, dq, dk, dv };
        device.attention_backward(&gradients).unwrap();
        [out, dq].map(|view| device.read(view).unwrap().wait().unwrap())
    }

    fn seen() -> &'static Mutex<Seen> {
        Box::leak(Box::default())
    }

    #[test]
    fn kernels_that_agree_are_taken_and_remembered() {
        let memory = seen();
        run(&card(false, memory));
        {
            let mut seen = memory.lock().unwrap();
            assert_eq!((seen.remembered.len(), seen.launches), (2, 6), "a check and a call each");
            (seen.launches, seen.on_h100) = (0, Vec::new());
        }
        run(&card(false, memory));
        assert_eq!(memory.lock().unwrap().launches, 3);
    }

    #[test]
    fn kernels_that_disagree_are_left() {
        let (memory, good) = (seen(), seen());
        let found = run(&card(true, memory));
        let seen = memory.lock().unwrap();
        assert_eq!((seen.remembered.len(), seen.launches), (0, 3));
        for (found, expected) in found.iter().flatten().zip(run(&card(false, good)).iter().flatten()) {
            assert!((found - expected).abs() < 0.05, "{found} for {expected}");
        }
    }
}
