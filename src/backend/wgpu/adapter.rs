//! Adapters: which there are, which is taken, and what it has. A feature that may be missing is asked about here alone.

use std::future::Future;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

use crate::backend::cache::Cache;
use crate::backend::{Error, Result};

/// What a device is kept from using of what its adapter has.
#[derive(Clone, Debug)]
pub struct Options {
    /// Bytes of a binding at most.
    pub binding: u64,
    /// Bytes of a buffer at most.
    pub buffer: u64,
    /// Whether shaders may use subgroups.
    pub subgroups: bool,
    /// One kernel and one shape of a tile, whatever the number of rows: a row's bits are the same alone and in a batch.
    pub batch_invariant: bool,
    /// The folder where compiled pipelines are kept for the next run; `h1/wgpu` of the user's cache where it is `None`.
    pub folder: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Options { binding: u64::MAX, buffer: u64::MAX, subgroups: true, batch_invariant: false, folder: None }
    }
}

/// What an adapter has of what is not there on all of them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Abilities {
    /// f16 in storage and in arithmetic.
    pub f16: bool,
    /// Times of single dispatches.
    pub timestamps: bool,
    /// The smallest and the largest number of lanes of a subgroup; 0 without subgroups.
    pub subgroups: (u32, u32),
    /// Whether it is a program that plays a GPU on a CPU: its subgroups are SIMD registers.
    pub software: bool,
    /// Cooperative matrices of 16 × 16 × 16, f16 in and f32 sums, in subgroups of 32.
    pub cooperative: bool,
    /// Bytes that a binding can show at most; no more than a buffer has.
    pub binding: u64,
    /// Bytes of a buffer at most, a multiple of all alignments.
    pub buffer: u64,
    /// To what bindings of storage and of uniforms are aligned, in bytes.
    pub alignment: (u64, u64),
    /// Compiled pipelines as bytes.
    pub pipeline_cache: bool,
    /// Workgroups along each side of a grid at most.
    pub grid: u32,
    /// One kernel and one shape of a tile, whatever the number of rows.
    pub batch_invariant: bool,
}

impl Abilities {
    /// The lanes of a workgroup of the kernels that are made for an adapter that is a CPU (`…_subgroup.wgsl`), which keep to
    /// registers of one subgroup: where all subgroups have one size of 4 to 16. Every other adapter takes the kernels that
    /// share workgroup memory; this is the only place where the kind of an adapter chooses.
    pub fn simd_lanes(&self) -> Option<usize> {
        let (least, most) = self.subgroups;
        (self.software && least == most && (4..=16).contains(&least)).then_some(least as usize)
    }
}

/// What the size of a buffer is a multiple of, in bytes: at least every alignment that WebGPU allows an adapter.
const WHOLE: u64 = 256;

/// An adapter that is open.
pub(super) struct Opened {
    pub device: wgpu::Device,
    pub queue: wgpu::Queue,
    pub abilities: Abilities,
    /// The adapter as a person knows it.
    pub name: String,
    pub failure: Failure,
    /// What pipelines compiled for it are kept under.
    pub entry: String,
}

/// The first thing that went wrong on a device outside of a call that could say so: a lost device, a driver's error.
#[derive(Clone, Debug, Default)]
pub(super) struct Failure(Arc<Mutex<Option<String>>>);

impl Failure {
    fn set(&self, what: String) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(what);
    }

    /// What it is.
    pub fn get(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The value of a future that a native device completes at once, or after some polling.
pub(super) fn complete<F: Future>(future: F) -> F::Output {
    let mut future = pin!(future);
    let mut context = Context::from_waker(Waker::noop());
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(value) => return value,
            Poll::Pending => std::thread::yield_now(),
        }
    }
}

/// Every adapter of the native interfaces, real GPUs first.
pub(super) fn adapters() -> Vec<wgpu::Adapter> {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
        backends: wgpu::Backends::VULKAN | wgpu::Backends::METAL | wgpu::Backends::DX12,
        flags: wgpu::InstanceFlags::empty().with_env(),
        ..wgpu::InstanceDescriptor::new_without_display_handle()
    });
    let mut adapters = complete(instance.enumerate_adapters(wgpu::Backends::all()));
    adapters.sort_by_key(|adapter| match adapter.get_info().device_type {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::IntegratedGpu => 1,
        wgpu::DeviceType::VirtualGpu => 2,
        wgpu::DeviceType::Other => 3,
        wgpu::DeviceType::Cpu => 4,
    });
    adapters
}

/// Whether an adapter is a real GPU, and no program that plays one.
pub(super) fn is_hardware(adapter: &wgpu::Adapter) -> bool {
    adapter.get_info().device_type != wgpu::DeviceType::Cpu
}

/// An adapter as a person knows it, with what it has and lacks.
pub(super) fn describe(adapter: &wgpu::Adapter) -> String {
    words(adapter, &abilities(adapter, &Options::default()).0)
}

fn words(adapter: &wgpu::Adapter, abilities: &Abilities) -> String {
    let info = adapter.get_info();
    let driver = [info.driver, info.driver_info].into_iter().filter(|word| !word.is_empty()).collect::<Vec<_>>();
    let Abilities { f16, timestamps, subgroups, cooperative, binding, pipeline_cache, .. } = *abilities;
    let lanes = match subgroups {
        (0, _) => "no subgroups".into(),
        (least, most) if least == most => format!("subgroups of {least}"),
        (least, most) => format!("subgroups of {least} to {most}"),
    };
    let has = |there: bool, what: &str| if there { what.into() } else { format!("no {what}") };
    let (matrices, cache) = (has(cooperative, "cooperative matrices"), has(pipeline_cache, "pipeline cache"));
    let binding = format!("{} MiB a binding", binding >> 20);
    let has = [has(f16, "f16"), lanes, matrices, has(timestamps, "timestamps"), cache, binding];
    format!("{}, {} {}; {}", info.name, info.backend, driver.join(" "), has.join(", "))
}

/// The adapter to use: the first real GPU, else the first; with the environment's `WGPU_ADAPTER_NAME`, the first whose
/// name has it.
///
/// # Errors
/// When there is none.
pub(super) fn choose() -> Result<wgpu::Adapter> {
    let unavailable = |why: String| Error::Unavailable { backend: "wgpu".into(), why };
    let wanted = std::env::var("WGPU_ADAPTER_NAME").unwrap_or_default().to_lowercase();
    let all = adapters();
    if all.is_empty() {
        return Err(unavailable("no adapter: there is no Vulkan, Metal or DX12 driver".into()));
    }
    let names: Vec<String> = all.iter().map(describe).collect();
    let found = all.into_iter().find(|adapter| adapter.get_info().name.to_lowercase().contains(&wanted));
    found.ok_or_else(|| unavailable(format!("no adapter is called '{wanted}'; there are: {}", names.join("; "))))
}

fn abilities(adapter: &wgpu::Adapter, options: &Options) -> (Abilities, wgpu::Features, wgpu::Limits) {
    let (there, limits, info) = (adapter.features(), adapter.limits(), adapter.get_info());
    let wanted = wgpu::Features::SHADER_F16
        | wgpu::Features::SUBGROUP
        | wgpu::Features::TIMESTAMP_QUERY
        | wgpu::Features::TIMESTAMP_QUERY_INSIDE_PASSES
        | wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX
        | wgpu::Features::PIPELINE_CACHE;
    let mut features = there & wanted;
    features.set(wgpu::Features::SUBGROUP, options.subgroups && features.contains(wgpu::Features::SUBGROUP));
    let subgroups = features.contains(wgpu::Features::SUBGROUP);
    let subgroup_sizes = if subgroups { (info.subgroup_min_size, info.subgroup_max_size) } else { (0, 0) };
    let f16 = features.contains(wgpu::Features::SHADER_F16);
    let cooperative =
        f16 && subgroup_sizes == (32, 32) && adapter.cooperative_matrix_properties().iter().any(is_what_shaders_use);
    features.set(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX, cooperative);
    let alignment =
        (u64::from(limits.min_storage_buffer_offset_alignment), u64::from(limits.min_uniform_buffer_offset_alignment));
    let buffer = limits.max_buffer_size.min(options.buffer).max(WHOLE) / WHOLE * WHOLE;
    let abilities = Abilities {
        f16,
        timestamps: features.contains(wgpu::Features::TIMESTAMP_QUERY_INSIDE_PASSES),
        subgroups: subgroup_sizes,
        software: info.device_type == wgpu::DeviceType::Cpu,
        cooperative,
        // A window of a buffer starts at a multiple of the alignment and ends at a multiple of 4.
        binding: limits.max_storage_buffer_binding_size.min(options.binding).min(buffer) / 4 * 4,
        buffer,
        alignment,
        grid: limits.max_compute_workgroups_per_dimension,
        batch_invariant: options.batch_invariant,
        pipeline_cache: features.contains(wgpu::Features::PIPELINE_CACHE),
    };
    (abilities, features, limits)
}

/// Whether a driver's kind of cooperative matrices is that of `…_cooperative.wgsl`.
fn is_what_shaders_use(kind: &wgpu::CooperativeMatrixProperties) -> bool {
    let sizes = (kind.m_size, kind.n_size, kind.k_size) == (16, 16, 16);
    sizes && (kind.ab_type, kind.cr_type) == (wgpu::CooperativeScalarType::F16, wgpu::CooperativeScalarType::F32)
}

/// Opens an adapter with all that it has and `options` allow.
///
/// # Errors
/// When its driver refuses.
pub(super) fn open(adapter: &wgpu::Adapter, options: &Options) -> Result<Opened> {
    let (abilities, required_features, required_limits) = abilities(adapter, options);
    let name = words(adapter, &abilities);
    // SAFETY: cooperative matrices are the only experimental feature that is asked for, and their results are compared with
    // those of plain arithmetic before they are used, see `cooperative`.
    let experimental_features = unsafe { wgpu::ExperimentalFeatures::enabled() };
    let descriptor = wgpu::DeviceDescriptor {
        label: Some("h1"),
        required_features,
        required_limits,
        memory_hints: wgpu::MemoryHints::MemoryUsage,
        experimental_features,
        ..Default::default()
    };
    let refused = |why: wgpu::RequestDeviceError| Error::Unavailable {
        backend: "wgpu".into(),
        why: format!("{name} could not be opened: {why}"),
    };
    let (device, queue) = complete(adapter.request_device(&descriptor)).map_err(refused)?;
    let failure = Failure::default();
    let (uncaptured, lost) = (failure.clone(), failure.clone());
    device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| uncaptured.set(error.to_string())));
    device.set_device_lost_callback(move |reason, what| match reason {
        wgpu::DeviceLostReason::Destroyed => {}
        _ => lost.set(format!("the device was lost: {what}")),
    });
    let info = adapter.get_info();
    let (card, backend) = (format!("{} {} {}", info.name, info.vendor, info.device), info.backend.to_str());
    let entry = Cache::name(&["pipelines", &card, backend, &info.driver, &info.driver_info]);
    Ok(Opened { device, queue, abilities, name, failure, entry })
}
