//! A driver that runs the kernels on the CPU: their text is compiled by the host's C++ compiler against `kernels/emulate.h`, and
//! device memory is the host's. Products, which have no kernel of ours, are plain loops here. For tests alone.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::{HashMap, HashSet};
use std::ffi::{CStr, c_char, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use half::{bf16, f16};
use libloading::Library;
use sha2::{Digest, Sha256};

use super::driver::{
    Arguments, Boxes, Driver, Finish, Graph, Kernel, Limits, Matrix, Pointer, Product, Region, Shape, TensorMap,
};
use super::mixers::AGREES;
use super::source::{HEADERS, KernelKey, ModuleKey, Source};
use crate::backend::{DType, Device, Error, Result};

/// Where the compiled kernels go, and how they run.
#[derive(Clone, Debug)]
pub struct Emulation {
    /// A folder for compiled kernels, which another run may find there.
    pub folder: PathBuf,
    /// The order in which the threads of a block take turns.
    pub order: u32,
    /// The architecture that it stands for, (9, 0) for an H100.
    pub capability: (u32, u32),
    /// Watch addresses and undefined behaviour; the process must have been started for it.
    pub sanitize: bool,
    /// Let functions that a card has to a few units in the last place be off by one, always the same way.
    pub rough: bool,
}

/// The device's name.
pub const NAME: &str = "emulated card";

/// A device whose kernels run on the CPU.
///
/// # Errors
/// When there is no C++ compiler.
pub fn device(emulation: Emulation) -> Result<Device> {
    Ok(super::over(Box::new(driver(emulation)?)))
}

/// Such a device, and the kernels that it launches.
///
/// # Errors
/// When there is no C++ compiler.
pub fn watched_device(emulation: Emulation) -> Result<(Device, Launched)> {
    let driver = driver(emulation)?;
    let launched = driver.launched.clone();
    Ok((super::over(Box::new(driver)), launched))
}

/// The kernels that a device has launched so far.
#[derive(Clone, Debug, Default)]
pub struct Launched(Arc<Mutex<HashSet<KernelKey>>>);

impl Launched {
    fn note(&self, kernel: &KernelKey) {
        let mut launched = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !launched.contains(kernel) {
            launched.insert(kernel.clone());
        }
    }

    /// Each of them, in no order.
    pub fn kernels(&self) -> Vec<KernelKey> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }
}

pub(super) fn driver(emulation: Emulation) -> Result<Emulated> {
    std::fs::create_dir_all(&emulation.folder).map_err(|error| failed("making a folder", error))?;
    let limits = Limits {
        name: NAME.into(),
        capability: emulation.capability,
        multiprocessors: 4,
        shared_bytes: 232_448,
        memory_bytes: 1 << 34,
        // Work is cut as finely as can be.
        launch_ns: 0,
    };
    let (memory, kernels, graphs, launched) = Default::default();
    Ok(Emulated { emulation, limits, memory, kernels, graphs, launched })
}

static EMULATE: [Source; 3] = [
    Source { name: "emulate.h", text: include_str!("../../../kernels/emulate.h") },
    Source { name: "emulate_sm90.h", text: include_str!("../../../kernels/emulate_sm90.h") },
    Source { name: "emulate_types.h", text: include_str!("../../../kernels/emulate_types.h") },
];

type Launcher = unsafe extern "C" fn(*mut *mut c_void, *const u32, *const u32, usize, u32) -> *const c_char;

pub(super) struct Emulated {
    emulation: Emulation,
    limits: Limits,
    memory: Mutex<HashMap<Pointer, Layout>>,
    kernels: Mutex<Kernels>,
    graphs: Mutex<Graphs>,
    launched: Launched,
}

/// What a graph does at a time.
#[derive(Clone)]
enum Node {
    Launch(Kernel, Shape, Arguments),
    Clear(Region),
    Product(Product),
}

#[derive(Default)]
struct Graphs {
    recording: Option<Vec<Node>>,
    made: HashMap<Graph, Vec<Node>>,
    next: usize,
}

#[derive(Default)]
struct Kernels {
    /// Kept open for the launchers.
    libraries: Vec<Library>,
    launchers: Vec<(Launcher, KernelKey)>,
}

fn failed(what: impl Into<String>, why: impl ToString) -> Error {
    Error::Failed { device: NAME.into(), what: what.into(), why: why.to_string() }
}

/// One compiler at a time, so that none compiles what another one is at.
static COMPILER: Mutex<()> = Mutex::new(());

impl Emulation {
    /// What the compiler is told of every kernel.
    fn flags(&self) -> Vec<&'static str> {
        let mut flags = vec!["-std=c++20", "-O1", "-fPIC", "-Wall", "-Wno-unknown-pragmas"];
        if self.sanitize {
            flags.extend(["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g"]);
        }
        flags
    }

    /// A name for what is made of some texts.
    fn name(&self, texts: &[&str]) -> String {
        let mut hash = Sha256::new();
        self.flags().iter().chain(texts).for_each(|text| hash.update(text));
        hash.finalize().iter().take(12).map(|byte| format!("{byte:02x}")).collect()
    }

    fn run(&self, what: &str, arguments: &[&Path]) -> Result<()> {
        let output = Command::new("g++").args(self.flags()).args(arguments).output();
        let output = output.map_err(|error| failed("running g++", error))?;
        if output.status.success() {
            return Ok(());
        }
        Err(failed(format!("compiling {what}"), String::from_utf8_lossy(&output.stderr)))
    }

    /// A folder with the headers, the large one compiled.
    fn headers(&self) -> Result<PathBuf> {
        let headers = || HEADERS.into_iter().chain(&EMULATE);
        let folder = self.folder.join(self.name(&headers().map(|header| header.text).collect::<Vec<_>>()));
        if folder.exists() {
            return Ok(folder);
        }
        let work = tempfile::tempdir_in(&self.folder).map_err(|error| failed("making a folder", error))?;
        for header in headers() {
            let path = work.path().join(header.name);
            std::fs::write(path, header.text).map_err(|error| failed("writing a header", error))?;
        }
        let (header, compiled) = (work.path().join("emulate.h"), work.path().join("emulate.h.gch"));
        self.run(
            "emulate.h",
            &["-w".as_ref(), "-x".as_ref(), "c++-header".as_ref(), &header, "-o".as_ref(), &compiled],
        )?;
        std::fs::rename(work.keep(), &folder).map_err(|error| failed("keeping the headers", error))?;
        Ok(folder)
    }

    /// The shared object of a kernel, compiled unless it is there.
    fn compile(&self, key: &KernelKey) -> Result<PathBuf> {
        let _one = COMPILER.lock().unwrap_or_else(PoisonError::into_inner);
        let headers = self.headers()?;
        let text = format!("{}\nH1_EXPORT({})\n", key.module.text(), key.entry);
        let object = headers.join(format!("{}.so", self.name(&[&text])));
        if object.exists() {
            return Ok(object);
        }
        let work = tempfile::tempdir_in(&headers).map_err(|error| failed("making a folder", error))?;
        let (source, made) = (work.path().join("module.cu"), work.path().join("module.so"));
        std::fs::write(&source, &text).map_err(|error| failed("writing a kernel", error))?;
        let arguments = ["-shared", "-include", "emulate.h", "-x", "c++", "-I"].map(Path::new);
        let arguments = [&arguments[..], &[&headers, &source, Path::new("-o"), &made]].concat();
        self.run(&format!("{} of {}", key.entry, key.module), &arguments)?;
        std::fs::rename(&made, &object).map_err(|error| failed("keeping a kernel", error))?;
        Ok(object)
    }
}

impl Emulated {
    fn graphs(&self) -> MutexGuard<'_, Graphs> {
        self.graphs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does a thing now, or when what is being recorded is replayed.
    fn work(&self, node: Node) -> Result<()> {
        match &mut self.graphs().recording {
            Some(nodes) => nodes.push(node),
            None => return self.work_now(&node),
        }
        Ok(())
    }

    fn work_now(&self, node: &Node) -> Result<()> {
        match node {
            Node::Launch(kernel, shape, arguments) => self.launch_now(*kernel, *shape, arguments),
            Node::Clear(region) => {
                for row in rows(*region) {
                    // SAFETY: the region lies in device memory.
                    unsafe { at::<u8>(row).write_bytes(0, region.width) };
                }
                Ok(())
            }
            Node::Product(product) => {
                multiply(product);
                Ok(())
            }
        }
    }

    fn launch_now(&self, kernel: Kernel, shape: Shape, arguments: &Arguments) -> Result<()> {
        let kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        let (launch, key) =
            kernels.launchers.get(kernel.0).ok_or_else(|| failed("launching", "there is no such kernel"))?;
        self.launched.note(key);
        let (mut arguments, shared) = (arguments.addresses(), shape.shared_bytes as usize);
        let (grid, block) = (shape.grid.as_ptr(), shape.block.as_ptr());
        let order = self.emulation.order | u32::from(self.emulation.rough) << 8;
        // SAFETY: the arguments are those of the kernel, which stays in its outputs.
        let error = unsafe { launch(arguments.as_mut_ptr(), grid, block, shared, order) };
        if error.is_null() {
            return Ok(());
        }
        // SAFETY: a text with an end.
        Err(failed(key.entry, unsafe { CStr::from_ptr(error) }.to_string_lossy()))
    }

    /// A card refuses these while it records.
    fn not_recording(&self, what: &str) -> Result<()> {
        if self.graphs().recording.is_none() { Ok(()) } else { Err(failed(what, "a graph is being recorded")) }
    }
}

impl Driver for Emulated {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn allocate(&self, bytes: usize, what: &str) -> Result<Pointer> {
        self.not_recording("allocating memory")?;
        let none = || Error::OutOfMemory { device: self.limits.name.clone(), what: what.into(), bytes };
        let layout = Layout::from_size_align(bytes.max(1), 256).map_err(|_| none())?;
        // SAFETY: the size is not 0.
        let start = unsafe { alloc_zeroed(layout) };
        if start.is_null() {
            return Err(none());
        }
        let start = start.expose_provenance() as Pointer;
        self.memory.lock().unwrap_or_else(PoisonError::into_inner).insert(start, layout);
        Ok(start)
    }

    fn free(&self, start: Pointer) {
        if let Some(layout) = self.memory.lock().unwrap_or_else(PoisonError::into_inner).remove(&start) {
            // SAFETY: allocated with this layout, and forgotten.
            unsafe { dealloc(at::<u8>(start), layout) };
        }
    }

    fn clear(&self, region: Region) -> Result<()> {
        self.work(Node::Clear(region))
    }

    fn upload(&self, from: &[u8], to: Region) -> Result<()> {
        self.not_recording("copying to the device")?;
        for (from, row) in from.chunks(to.width.max(1)).zip(rows(to)) {
            // SAFETY: the region lies in device memory.
            unsafe { at::<u8>(row).copy_from_nonoverlapping(from.as_ptr(), to.width) };
        }
        Ok(())
    }

    fn download(&self, from: Region) -> Result<Finish> {
        self.not_recording("copying from the device")?;
        let mut bytes = Vec::with_capacity(from.width * from.rows);
        for row in rows(from) {
            // SAFETY: the region lies in device memory.
            bytes.extend_from_slice(unsafe { std::slice::from_raw_parts(at::<u8>(row), from.width) });
        }
        Ok(Box::new(move || Ok(bytes)))
    }

    fn load(&self, key: &KernelKey) -> Result<Kernel> {
        let object = self.emulation.compile(key)?;
        let symbol = format!("h1_launch_{}", key.entry);
        // SAFETY: compiled from our own text, which does nothing when it is loaded.
        let library = unsafe { Library::new(&object) }.map_err(|error| failed("loading a kernel", error))?;
        // SAFETY: H1_EXPORT declares it so.
        let launcher = unsafe { library.get::<Launcher>(&symbol) }.map(|symbol| *symbol);
        let launcher = launcher.map_err(|error| failed("loading a kernel", error))?;
        let mut kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        kernels.libraries.push(library);
        kernels.launchers.push((launcher, key.clone()));
        Ok(Kernel(kernels.launchers.len() - 1))
    }

    /// Every test holds the kernels to the reference, so that they need not be held to each other at first.
    fn recall(&self, _: &ModuleKey) -> Option<Vec<u8>> {
        Some(AGREES.into())
    }

    fn remember(&self, _: &ModuleKey, _: &[u8]) {}

    /// `TensorMap` of `ptx.cuh` on the CPU.
    fn tensor_map(&self, boxes: &Boxes) -> Result<TensorMap> {
        let [columns, heads, rows, box_heads, box_rows] =
            [boxes.columns, boxes.heads, boxes.rows, boxes.box_heads, boxes.box_rows].map(u64::from);
        let (row_bytes, head_bytes) = (boxes.row_bytes as u64, boxes.head_bytes());
        let mut map = [0; 16];
        map[..8].copy_from_slice(&[boxes.start, row_bytes, head_bytes, columns, heads, rows, box_heads, box_rows]);
        Ok(map)
    }

    fn launch(&self, kernel: Kernel, shape: Shape, arguments: &Arguments) -> Result<()> {
        self.work(Node::Launch(kernel, shape, arguments.clone()))
    }

    fn product(&self, product: &Product) -> Result<()> {
        self.work(Node::Product(*product))
    }

    fn begin_recording(&self) -> Result<()> {
        self.not_recording("beginning a graph")?;
        self.graphs().recording = Some(Vec::new());
        Ok(())
    }

    fn end_recording(&self) -> Result<Graph> {
        let mut graphs = self.graphs();
        let nodes = graphs.recording.take().ok_or_else(|| failed("recording a graph", "none was begun"))?;
        graphs.next += 1;
        let graph = Graph(graphs.next);
        graphs.made.insert(graph, nodes);
        Ok(graph)
    }

    fn replay(&self, graph: Graph) -> Result<()> {
        let nodes = self.graphs().made.get(&graph).cloned();
        let nodes = nodes.ok_or_else(|| failed("launching", "there is no such graph"))?;
        nodes.iter().try_for_each(|node| self.work_now(node))
    }

    fn forget(&self, graph: Graph) {
        self.graphs().made.remove(&graph);
    }

    fn synchronise(&self) -> Result<()> {
        Ok(())
    }
}

impl Drop for Emulated {
    fn drop(&mut self) {
        let memory = std::mem::take(self.memory.get_mut().unwrap_or_else(PoisonError::into_inner));
        for (start, layout) in memory {
            // SAFETY: allocated with this layout, and forgotten.
            unsafe { dealloc(at::<u8>(start), layout) };
        }
    }
}

/// A product in plain loops.
fn multiply(product: &Product) {
    let &Product { m, n, k, a, b, out, bias, add } = product;
    let (a, b) = (values(a, m, k), values(b, k, n));
    for i in 0..m {
        let mut sums = vec![0.0f32; n];
        for (j, sum) in sums.iter_mut().enumerate().filter(|_| bias != 0) {
            *sum = get(bias, out.dtype, j);
        }
        for (l, &factor) in a[i * k..][..k].iter().enumerate() {
            sums.iter_mut().zip(&b[l * n..][..n]).for_each(|(sum, b)| *sum += factor * b);
        }
        for (j, sum) in sums.into_iter().enumerate() {
            let index = i * out.stride + j;
            let before = if add { get(out.start, out.dtype, index) } else { 0.0 };
            put(out.start, out.dtype, index, before + sum);
        }
    }
}

/// Device memory as host memory.
fn at<T>(pointer: Pointer) -> *mut T {
    std::ptr::with_exposed_provenance_mut(pointer as usize)
}

/// Where the rows of a region start.
fn rows(region: Region) -> impl Iterator<Item = Pointer> {
    (0..region.rows as u64).map(move |row| region.start + row * region.pitch as u64)
}

fn get(start: Pointer, dtype: DType, index: usize) -> f32 {
    // SAFETY: a value of a matrix in device memory.
    unsafe {
        match dtype {
            DType::Bf16 => (*at::<bf16>(start).add(index)).to_f32(),
            DType::F16 => (*at::<f16>(start).add(index)).to_f32(),
            _ => *at::<f32>(start).add(index),
        }
    }
}

fn put(start: Pointer, dtype: DType, index: usize, value: f32) {
    // SAFETY: a value of a matrix in device memory.
    unsafe {
        match dtype {
            DType::Bf16 => *at::<bf16>(start).add(index) = bf16::from_f32(value),
            DType::F16 => *at::<f16>(start).add(index) = f16::from_f32(value),
            _ => *at::<f32>(start).add(index) = value,
        }
    }
}

/// The values of a factor `[rows, cols]`, row-major.
fn values(matrix: Matrix, rows: usize, cols: usize) -> Vec<f32> {
    let index = |r: usize, c: usize| if matrix.transposed { c * matrix.stride + r } else { r * matrix.stride + c };
    let all = (0..rows).flat_map(|r| (0..cols).map(move |c| (r, c)));
    all.map(|(r, c)| get(matrix.start, matrix.dtype, index(r, c))).collect()
}
