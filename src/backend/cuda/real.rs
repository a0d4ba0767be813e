//! The driver of a card: CUDA's driver interface, NVRTC and cuBLASLt, all found when the program runs. One stream takes all
//! calls in order.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::{self, CUdevice, CUdevice_attribute as Attribute, CUmemorytype, CUresult};

use super::blas::{self, Blas, WORKSPACE};
use super::driver::{
    Arguments, Boxes, Driver, Finish, Graph, Kernel, Limits, Pointer, Product, Region, Shape, TensorMap,
};
use super::heap::Heap;
use super::source::{HEADERS, KernelKey, ModuleKey};
use super::staging::{Arrival, Ring, SLOT, Spare};
use super::{compiler, libraries};
use crate::backend::cache::Cache;
use crate::backend::{Error, Result};

/// The oldest driver, by the version of CUDA that it knows.
const OLDEST: (u32, u32) = (12, 0);
/// Nanoseconds that a launch takes beside its work: those of a step of decoding take about as long on an H100.
const LAUNCH_NS: usize = 4000;

fn unavailable(why: impl Into<String>) -> Error {
    Error::Unavailable { backend: "cuda".into(), why: why.into() }
}

/// What the driver calls a result.
fn message(result: CUresult) -> String {
    let mut text = std::ptr::null();
    // SAFETY: writes the address of a text with an end, or null.
    unsafe {
        sys::cuGetErrorString(result, &mut text);
        if text.is_null() { format!("{result:?}") } else { CStr::from_ptr(text).to_string_lossy().into_owned() }
    }
}

/// A result of the driver, where a device did something.
pub fn check(device: &str, what: &str, result: CUresult) -> Result<()> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    Err(Error::Failed { device: device.into(), what: what.into(), why: message(result) })
}

/// The card of a number, with the driver's version, once driver and libraries are known to be there.
fn find(ordinal: i32) -> Result<(CUdevice, Limits)> {
    // SAFETY: looks for the library.
    let driver = libraries::preload_unless(&["libcuda.so"], || unsafe { sys::is_culib_present() });
    driver.ok_or_else(|| unavailable("no NVIDIA driver (libcuda.so.1) was found"))?;
    let opened = |result| match result {
        CUresult::CUDA_SUCCESS => Ok(()),
        CUresult::CUDA_ERROR_NO_DEVICE => Err(unavailable("the NVIDIA driver finds no card")),
        other => Err(unavailable(format!("the NVIDIA driver does not start: {}", message(other)))),
    };
    let (mut device, mut version, mut bytes, mut name) = (0, 0, 0, [0u8; 256]);
    // SAFETY: each writes what it is given room for.
    unsafe {
        opened(sys::cuInit(0))?;
        opened(sys::cuDriverGetVersion(&mut version))?;
        opened(sys::cuDeviceGet(&mut device, ordinal))?;
        opened(sys::cuDeviceGetName(name.as_mut_ptr().cast(), name.len() as i32 - 1, device))?;
        opened(sys::cuDeviceTotalMem_v2(&mut bytes, device))?;
    }
    let version = version.unsigned_abs();
    let version = (version / 1000, version % 1000 / 10);
    if version < OLDEST {
        let ((major, minor), (least, _)) = (version, OLDEST);
        return Err(unavailable(format!("the NVIDIA driver knows CUDA {major}.{minor}; {least}.0 or later is needed")));
    }
    let (major, minor) = compiler::version().map_err(unavailable)?;
    if major > version.0 {
        let why = format!(
            "NVRTC is of CUDA {major}.{minor}, which the driver, of CUDA {}.{}, is too old for",
            version.0, version.1
        );
        return Err(unavailable(why));
    }
    blas::present().map_err(unavailable)?;
    let number = |attribute| {
        let mut value = 0;
        // SAFETY: writes a number.
        opened(unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, device) }).map(|()| value.unsigned_abs())
    };
    let capability = (
        number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    );
    let name = CStr::from_bytes_until_nul(&name).map(CStr::to_string_lossy).unwrap_or_default().into_owned();
    if capability < (8, 0) {
        let (major, minor) = capability;
        return Err(unavailable(format!("{name} is of architecture {major}.{minor}; 8.0 or later is needed")));
    }
    let limits = Limits {
        name,
        capability,
        multiprocessors: number(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize,
        shared_bytes: number(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize,
        memory_bytes: bytes,
        launch_ns: LAUNCH_NS,
    };
    Ok((device, limits))
}

/// A card in words.
pub fn describe(ordinal: i32) -> Result<String> {
    find(ordinal).map(|(_, limits)| super::words(&limits))
}

/// A card's context and its one stream.
pub struct Context {
    /// The card's name.
    pub name: String,
    /// The stream.
    pub stream: sys::CUstream,
    context: sys::CUcontext,
    device: CUdevice,
}

// SAFETY: the driver's handles may be used by any thread.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    fn new(device: CUdevice, name: &str) -> Result<Self> {
        let mut context = std::ptr::null_mut();
        // SAFETY: writes a handle.
        check(name, "opening the card", unsafe { sys::cuDevicePrimaryCtxRetain(&mut context, device) })?;
        let mut opened = Context { name: name.into(), stream: std::ptr::null_mut(), context, device };
        opened.enter()?;
        let own = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: writes a handle; the context is current.
        check(name, "making a stream", unsafe { sys::cuStreamCreate(&mut opened.stream, own) })?;
        Ok(opened)
    }

    /// Makes it the calling thread's.
    pub fn enter(&self) -> Result<()> {
        // SAFETY: a context that is retained.
        self.check("entering the context", unsafe { sys::cuCtxSetCurrent(self.context) })
    }

    /// Waits until the stream has done all that it was given.
    pub fn synchronise(&self) -> Result<()> {
        self.enter()?;
        // SAFETY: the context's own stream.
        self.check("waiting for the device", unsafe { sys::cuStreamSynchronize(self.stream) })
    }

    /// A result of the driver.
    pub fn check(&self, what: &str, result: CUresult) -> Result<()> {
        check(&self.name, what, result)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: the card's own handles; the stream finishes what it has.
        unsafe {
            if !self.stream.is_null() {
                sys::cuStreamDestroy_v2(self.stream);
            }
            sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}

/// A kernel on the card.
#[derive(Clone, Copy)]
struct Loaded {
    function: sys::CUfunction,
    name: &'static str,
    /// Whether it may be launched early: see [`Source::early`](super::source::Source::early).
    early: bool,
}

/// What changes from call to call.
struct Parts {
    ring: Ring,
    blas: Blas,
    modules: HashMap<ModuleKey, sys::CUmodule>,
    kernels: Vec<Loaded>,
    /// Whether the last launch was that of a kernel which may be launched early, after which another one may.
    early: bool,
    graphs: HashMap<Graph, sys::CUgraphExec>,
    /// Graphs made so far.
    made: usize,
}

// SAFETY: the driver's handles may be used by any thread.
unsafe impl Send for Parts {}

/// A card.
pub struct Card {
    limits: Limits,
    /// Tells this card, with this driver, from all others.
    identity: String,
    compiler: (u32, u32),
    cache: Cache,
    parts: Mutex<Parts>,
    heap: Heap,
    spare: Spare,
    /// Last, so that all else is gone before it.
    context: Arc<Context>,
}

impl Card {
    /// Opens the card of a number.
    ///
    /// # Errors
    /// When the driver or a library is missing or too old, or there is no such card: says which.
    pub fn open(ordinal: i32) -> Result<Self> {
        let (device, limits) = find(ordinal)?;
        let compiler = compiler::version().map_err(unavailable)?;
        let context = Arc::new(Context::new(device, &limits.name)?);
        let heap = Heap::new(&context, limits.memory_bytes);
        let workspace = heap.allocate(WORKSPACE, "products")?;
        let cache = Cache::of_user("cuda");
        let blas = Blas::new(&limits.name, workspace, &cache).map_err(unavailable)?;
        let (modules, kernels, graphs) = (HashMap::new(), Vec::new(), HashMap::new());
        let parts = Parts { ring: Ring::new(&context)?, blas, modules, kernels, graphs, early: false, made: 0 };
        let identity = identity(&limits, device)?;
        let (parts, spare) = (Mutex::new(parts), Spare::default());
        Ok(Card { limits, identity, compiler, cache, parts, heap, spare, context })
    }

    fn parts(&self) -> MutexGuard<'_, Parts> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, what: impl Into<String>, why: impl Into<String>) -> Error {
        Error::Failed { device: self.limits.name.clone(), what: what.into(), why: why.into() }
    }

    /// The name of what is kept of a module; `of` tells its code apart from what was found out about it.
    fn entry(&self, module: &ModuleKey, of: &[&str]) -> String {
        let text = module.text();
        let identity = compiler::identity(self.compiler, &compiler::architecture(self.limits.capability));
        let mut parts = vec![identity.as_str(), &text];
        parts.extend(HEADERS.iter().flat_map(|header| [header.name, header.text]));
        parts.extend(of);
        Cache::name(&parts)
    }

    /// The name of what was found out about a module on this card with this driver.
    fn findings(&self, module: &ModuleKey) -> String {
        self.entry(module, &["findings", &self.identity])
    }

    /// The code of a module, from the cache or from the compiler.
    fn cubin(&self, module: &ModuleKey) -> Result<Vec<u8>> {
        let entry = self.entry(module, &[]);
        if let Some(cubin) = self.cache.get(&entry) {
            return Ok(cubin);
        }
        let (text, architecture) = (module.text(), compiler::architecture(self.limits.capability));
        let headers = HEADERS.map(|header| (header.name, header.text));
        let compiled = compiler::compile(&text, &headers, &architecture);
        let cubin = compiled.map_err(|log| self.failed(format!("compiling {module}"), log))?.cubin;
        self.cache.put(&entry, &cubin);
        Ok(cubin)
    }

    fn module(&self, parts: &mut Parts, key: &ModuleKey) -> Result<sys::CUmodule> {
        if let Some(&module) = parts.modules.get(key) {
            return Ok(module);
        }
        let cubin = self.cubin(key)?;
        let mut module = std::ptr::null_mut();
        // SAFETY: a cubin, whole; the context is current.
        let result = unsafe { sys::cuModuleLoadData(&mut module, cubin.as_ptr().cast()) };
        self.context.check(&format!("loading {key}"), result)?;
        parts.modules.insert(key.clone(), module);
        Ok(module)
    }

    /// Lets a kernel ask for as much shared memory as the card has beside what it declares.
    fn allow_shared(&self, function: sys::CUfunction) -> Result<()> {
        let mut declared = 0;
        let (size, most) = (
            sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES,
            sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
        );
        // SAFETY: writes a number, and sets one, of a function that is loaded.
        unsafe {
            self.context.check("asking a kernel", sys::cuFuncGetAttribute(&mut declared, size, function))?;
            let rest = self.limits.shared_bytes as i32 - declared;
            self.context.check("setting up a kernel", sys::cuFuncSetAttribute(function, most, rest))
        }
    }
}

/// A card's own number, and the driver's version.
fn identity(limits: &Limits, device: CUdevice) -> Result<String> {
    let (mut uuid, mut version) = (sys::CUuuid { bytes: [0; 16] }, 0);
    // SAFETY: each writes what it is given room for.
    unsafe {
        check(&limits.name, "asking the card", sys::cuDeviceGetUuid_v2(&mut uuid, device))?;
        check(&limits.name, "asking the driver", sys::cuDriverGetVersion(&mut version))?;
    }
    Ok(format!("{} {:?} {version}", limits.name, uuid.bytes))
}

/// A copy of rows between the device and pinned memory without gaps.
fn copy_rows(region: Region, pinned: *mut std::ffi::c_void, to_device: bool) -> sys::CUDA_MEMCPY2D {
    let (host, device) = (CUmemorytype::CU_MEMORYTYPE_HOST, CUmemorytype::CU_MEMORYTYPE_DEVICE);
    let (from, to) = if to_device { (host, device) } else { (device, host) };
    let pitch = |kind| if kind == host { region.width } else { region.pitch };
    sys::CUDA_MEMCPY2D {
        srcXInBytes: 0,
        srcY: 0,
        srcMemoryType: from,
        srcHost: pinned,
        srcDevice: region.start,
        srcArray: std::ptr::null_mut(),
        srcPitch: pitch(from),
        dstXInBytes: 0,
        dstY: 0,
        dstMemoryType: to,
        dstHost: pinned,
        dstDevice: region.start,
        dstArray: std::ptr::null_mut(),
        dstPitch: pitch(to),
        WidthInBytes: region.width,
        Height: region.rows,
    }
}

/// Rows without gaps are one row.
fn joined(region: Region) -> Region {
    if region.rows == 1 || region.pitch == region.width {
        let width = region.width * region.rows;
        return Region { width, rows: 1, pitch: width, ..region };
    }
    region
}

/// Cuts a region into parts of at most [`SLOT`] bytes, in the order of their bytes.
fn parts_of(region: Region) -> impl Iterator<Item = Region> {
    let region = joined(region);
    let rows = if region.width <= SLOT { (SLOT / region.width.max(1)).max(1) } else { 1 };
    let width = region.width.min(SLOT);
    (0..region.rows).step_by(rows).flat_map(move |row| {
        (0..region.width).step_by(width.max(1)).map(move |byte| Region {
            start: region.start + (row * region.pitch + byte) as u64,
            width: width.min(region.width - byte),
            rows: rows.min(region.rows - row),
            pitch: region.pitch,
        })
    })
}

impl Driver for Card {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn allocate(&self, bytes: usize, what: &str) -> Result<Pointer> {
        self.parts().early = false;
        self.heap.allocate(bytes, what)
    }

    fn free(&self, start: Pointer) {
        self.heap.free(start);
    }

    fn plan(&self, bytes: usize) -> Result<()> {
        self.heap.reserve(bytes)
    }

    fn clear(&self, region: Region) -> Result<()> {
        self.context.enter()?;
        self.parts().early = false;
        let Region { start, width, rows, pitch } = joined(region);
        // SAFETY: the region lies in device memory.
        let result = unsafe {
            if rows == 1 {
                sys::cuMemsetD8Async(start, 0, width, self.context.stream)
            } else {
                sys::cuMemsetD2D8Async(start, pitch, 0, width, rows, self.context.stream)
            }
        };
        self.context.check("clearing memory", result)
    }

    fn upload(&self, from: &[u8], to: Region) -> Result<()> {
        self.context.enter()?;
        let (mut parts, mut rest) = (self.parts(), from);
        parts.early = false;
        for part in parts_of(to) {
            let bytes = rest.split_off(..part.width * part.rows);
            let bytes = bytes.ok_or_else(|| self.failed("copying to the device", "too few bytes"))?;
            // SAFETY: the region lies in device memory, the slot stays until the copy is done.
            parts.ring.send(&self.context, bytes, |pinned| unsafe {
                if part.rows == 1 {
                    sys::cuMemcpyHtoDAsync_v2(part.start, pinned, part.width, self.context.stream)
                } else {
                    sys::cuMemcpy2DAsync_v2(&copy_rows(part, pinned, true), self.context.stream)
                }
            })?;
        }
        Ok(())
    }

    fn download(&self, from: Region) -> Result<Finish> {
        self.context.enter()?;
        let (from, len) = (joined(from), from.width * from.rows);
        // SAFETY: the region lies in device memory, the pinned memory stays until the copy is done.
        let arrival = Arrival::start(&self.context, &self.spare, len, |pinned| unsafe {
            if from.rows == 1 {
                sys::cuMemcpyDtoHAsync_v2(pinned, from.start, len, self.context.stream)
            } else {
                sys::cuMemcpy2DAsync_v2(&copy_rows(from, pinned, false), self.context.stream)
            }
        })?;
        Ok(Box::new(move || arrival.finish(len)))
    }

    fn load(&self, key: &KernelKey) -> Result<Kernel> {
        self.context.enter()?;
        let mut parts = self.parts();
        let module = self.module(&mut parts, &key.module)?;
        let name = CString::new(key.entry).map_err(|error| self.failed("naming a kernel", error.to_string()))?;
        let mut function = std::ptr::null_mut();
        // SAFETY: a module that is loaded.
        let result = unsafe { sys::cuModuleGetFunction(&mut function, module, name.as_ptr()) };
        self.context.check(&format!("finding {} in {}", key.entry, key.module), result)?;
        self.allow_shared(function)?;
        let early = key.module.source.early() && self.limits.capability >= (9, 0);
        parts.kernels.push(Loaded { function, name: key.entry, early });
        Ok(Kernel(parts.kernels.len() - 1))
    }

    fn recall(&self, module: &ModuleKey) -> Option<Vec<u8>> {
        self.cache.get(&self.findings(module))
    }

    fn remember(&self, module: &ModuleKey, value: &[u8]) {
        self.cache.put(&self.findings(module), value);
    }

    fn tensor_map(&self, boxes: &Boxes) -> Result<TensorMap> {
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        let sizes = [boxes.columns, boxes.heads, boxes.rows].map(u64::from);
        let (strides, of_box) = ([boxes.head_bytes(), boxes.row_bytes as u64], [64, boxes.box_heads, boxes.box_rows]);
        // SAFETY: writes the map; the arrays have a number an axis, the strides one less.
        let result = unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT16,
                3,
                std::ptr::with_exposed_provenance_mut(boxes.start as usize),
                sizes.as_ptr(),
                strides.as_ptr(),
                of_box.as_ptr(),
                [1; 3].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        self.context.check("describing a matrix to the copy engine", result)?;
        Ok(map.opaque)
    }

    /// A kernel that may be launched early is, but only after another such one: that one has waited for all before it when
    /// this one starts, so that what this one reads before it waits, weights and keys of earlier steps, is there.
    fn launch(&self, kernel: Kernel, shape: Shape, arguments: &Arguments) -> Result<()> {
        self.context.enter()?;
        let mut parts = self.parts();
        let found = parts.kernels.get(kernel.0).copied();
        let Loaded { function, name, early } =
            found.ok_or_else(|| self.failed("launching", "there is no such kernel"))?;
        let (Shape { grid, block, shared_bytes }, mut addresses) = (shape, arguments.addresses());
        let early_now = early & std::mem::replace(&mut parts.early, early);
        // SAFETY: all 0 is a valid attribute.
        let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
        attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        attribute.value.programmaticStreamSerializationAllowed = 1;
        let config = sys::CUlaunchConfig {
            gridDimX: grid[0],
            gridDimY: grid[1],
            gridDimZ: grid[2],
            blockDimX: block[0],
            blockDimY: block[1],
            blockDimZ: block[2],
            sharedMemBytes: shared_bytes,
            hStream: self.context.stream,
            attrs: &mut attribute,
            numAttrs: early_now.into(),
        };
        // SAFETY: the arguments are those of the kernel, and are read before this returns.
        let result = unsafe { sys::cuLaunchKernelEx(&config, function, addresses.as_mut_ptr(), std::ptr::null_mut()) };
        self.context.check(name, result)
    }

    fn product(&self, product: &Product) -> Result<()> {
        self.context.enter()?;
        let mut parts = self.parts();
        parts.early = false;
        let made = parts.blas.product(product, self.context.stream.cast(), &self.cache);
        made.map_err(|why| self.failed("a product", why))
    }

    fn begin_recording(&self) -> Result<()> {
        self.context.enter()?;
        self.parts().early = false;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the context's own stream.
        let result = unsafe { sys::cuStreamBeginCapture_v2(self.context.stream, mode) };
        self.context.check("beginning a graph", result)
    }

    fn end_recording(&self) -> Result<Graph> {
        self.context.enter()?;
        let (mut graph, mut ready) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: each writes a handle; the graph is not used once it has been made ready.
        unsafe {
            let ended = sys::cuStreamEndCapture(self.context.stream, &mut graph);
            self.context.check("recording a graph", ended)?;
            let result = sys::cuGraphInstantiateWithFlags(&mut ready, graph, 0);
            sys::cuGraphDestroy(graph);
            self.context.check("making a graph ready", result)?;
        }
        let mut parts = self.parts();
        parts.made += 1;
        let graph = Graph(parts.made);
        parts.graphs.insert(graph, ready);
        Ok(graph)
    }

    fn replay(&self, graph: Graph) -> Result<()> {
        self.context.enter()?;
        let found = self.parts().graphs.get(&graph).copied();
        let ready = found.ok_or_else(|| self.failed("launching", "there is no such graph"))?;
        self.parts().early = false;
        // SAFETY: a graph that was made ready, on the stream that it was recorded from.
        self.context.check("a graph", unsafe { sys::cuGraphLaunch(ready, self.context.stream) })
    }

    fn forget(&self, graph: Graph) {
        if let Some(ready) = self.parts().graphs.remove(&graph)
            && self.context.enter().is_ok()
        {
            // SAFETY: forgotten above; one that still runs goes when it is done.
            unsafe { sys::cuGraphExecDestroy(ready) };
        }
    }

    fn synchronise(&self) -> Result<()> {
        self.context.synchronise()
    }
}

impl Drop for Card {
    fn drop(&mut self) {
        if self.synchronise().is_err() {
            return;
        }
        let parts = self.parts();
        for &graph in parts.graphs.values() {
            // SAFETY: made here, and it does not run any more.
            unsafe { sys::cuGraphExecDestroy(graph) };
        }
        for &module in parts.modules.values() {
            // SAFETY: loaded here, and nothing of it runs any more.
            unsafe { sys::cuModuleUnload(module) };
        }
    }
}
