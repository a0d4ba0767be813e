//! Pipelines, each made once: by kernel, and by which of its bindings are written; and what the driver made of them, kept for
//! the next run.

use std::collections::{HashMap, HashSet};
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

use super::adapter::{Abilities, complete};
use super::recorder::Counters;
use super::shaders::{Kernel, MOST_TYPES};
use crate::backend::DType;
use crate::backend::cache::Cache;

/// Bytes of the uniform block of a dispatch at most.
pub(super) const PARAMETERS: u64 = 256;

/// Which of so many bindings are written: a bit a binding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Access {
    pub bindings: u32,
    pub written: u32,
}

struct Layout {
    tensors: wgpu::BindGroupLayout,
    pipeline: wgpu::PipelineLayout,
}

/// The pipelines of a device.
pub(super) struct Pipelines {
    device: wgpu::Device,
    parameters: wgpu::BindGroupLayout,
    layouts: HashMap<Access, Layout>,
    modules: HashMap<(&'static str, [DType; MOST_TYPES]), wgpu::ShaderModule>,
    pipelines: HashMap<(Kernel, Access), wgpu::ComputePipeline>,
    kept: Option<Kept>,
    counters: Counters,
}

/// What the driver made of pipelines, kept for the next run.
struct Kept {
    made: wgpu::PipelineCache,
    folder: Cache,
    entry: String,
    /// Whether there are pipelines that the folder does not have.
    new: bool,
}

/// What a pipeline is made of.
struct Recipe {
    kernel: Kernel,
    module: wgpu::ShaderModule,
    layout: wgpu::PipelineLayout,
}

impl Recipe {
    /// Makes it; or what the driver has against it.
    fn make(
        &self,
        device: &wgpu::Device,
        cache: Option<&wgpu::PipelineCache>,
    ) -> Result<wgpu::ComputePipeline, String> {
        let Recipe { kernel, module, layout } = self;
        let scopes = [wgpu::ErrorFilter::OutOfMemory, wgpu::ErrorFilter::Internal, wgpu::ErrorFilter::Validation];
        let scopes = scopes.map(|filter| device.push_error_scope(filter));
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(kernel.entry),
            layout: Some(layout),
            module,
            entry_point: Some(kernel.entry),
            compilation_options: wgpu::PipelineCompilationOptions {
                constants: &kernel.constants(),
                zero_initialize_workgroup_memory: false,
            },
            cache,
        });
        let mut error = None;
        for scope in scopes.into_iter().rev() {
            error = complete(scope.pop()).or(error);
        }
        match error {
            None => Ok(pipeline),
            Some(error) => Err(format!("{}.wgsl, {}: {error}", kernel.shader().name, kernel.entry)),
        }
    }
}

fn buffer(binding: u32, ty: wgpu::BufferBindingType, has_dynamic_offset: bool) -> wgpu::BindGroupLayoutEntry {
    wgpu::BindGroupLayoutEntry {
        binding,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset, min_binding_size: None },
        count: None,
    }
}

impl Pipelines {
    /// None yet; `folder` has what the driver made of some under `entry`, where it was kept.
    pub fn new(
        device: &wgpu::Device,
        abilities: &Abilities,
        (folder, entry): (Cache, String),
        counters: Counters,
    ) -> Self {
        let parameters = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
            label: Some("parameters"),
            entries: &[buffer(0, wgpu::BufferBindingType::Uniform, true)],
        });
        Pipelines {
            device: device.clone(),
            parameters,
            layouts: HashMap::new(),
            modules: HashMap::new(),
            pipelines: HashMap::new(),
            kept: abilities.pipeline_cache.then(|| Kept::open(device, folder, entry)),
            counters,
        }
    }

    /// The layout of the uniform block's group.
    pub fn parameters(&self) -> &wgpu::BindGroupLayout {
        &self.parameters
    }

    fn layout(&mut self, access: Access) -> &Layout {
        let (device, parameters) = (&self.device, &self.parameters);
        self.layouts.entry(access).or_insert_with(|| {
            let entry = |i| {
                let read_only = access.written >> i & 1 == 0;
                buffer(i, wgpu::BufferBindingType::Storage { read_only }, false)
            };
            let entries: Vec<_> = (0..access.bindings).map(entry).collect();
            let tensors = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
                label: Some("tensors"),
                entries: &entries,
            });
            let pipeline = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
                label: None,
                bind_group_layouts: &[Some(&tensors), Some(parameters)],
                immediate_size: 0,
            });
            Layout { tensors, pipeline }
        })
    }

    /// The layout of the group of tensors.
    pub fn tensors(&mut self, access: Access) -> &wgpu::BindGroupLayout {
        &self.layout(access).tensors
    }

    /// The pipeline of a kernel, made if it was not there; or what the driver has against it.
    pub fn get(&mut self, kernel: &Kernel, access: Access) -> Result<wgpu::ComputePipeline, String> {
        if let Some(pipeline) = self.pipelines.get(&(*kernel, access)) {
            return Ok(pipeline.clone());
        }
        let recipe = self.recipe(kernel, access)?;
        let pipeline = recipe.make(&self.device, self.kept.as_ref().map(|kept| &kept.made))?;
        self.insert((*kernel, access), pipeline.clone());
        Ok(pipeline)
    }

    fn insert(&mut self, key: (Kernel, Access), pipeline: wgpu::ComputePipeline) {
        self.pipelines.insert(key, pipeline);
        self.counters.count_pipeline();
        if let Some(kept) = &mut self.kept {
            kept.new = true;
        }
    }

    /// Makes those of some pipelines that are not there, on all cores, and keeps them; `progress` hears how many of how many
    /// are done. What cannot be made is left to the call that needs it, which says why.
    pub fn make_all(&mut self, mut wanted: Vec<(Kernel, Access)>, progress: &mut dyn FnMut(usize, usize)) {
        let mut seen = HashSet::new();
        wanted.retain(|key| !self.pipelines.contains_key(key) && seen.insert(*key));
        let recipes: Vec<_> = wanted.iter().filter_map(|key| Some((*key, self.recipe(&key.0, key.1).ok()?))).collect();
        let (next, total) = (AtomicUsize::new(0), recipes.len());
        let threads = std::thread::available_parallelism().map_or(1, NonZeroUsize::get).min(total);
        let (device, cache) = (self.device.clone(), self.kept.as_ref().map(|kept| kept.made.clone()));
        let (done, made) = mpsc::channel();
        std::thread::scope(|scope| {
            for _ in 0..threads {
                let (done, recipes, next, device, cache) = (done.clone(), &recipes, &next, &device, cache.as_ref());
                scope.spawn(move || {
                    while let Some((key, recipe)) = recipes.get(next.fetch_add(1, Ordering::Relaxed)) {
                        // The receiver stays until all are done.
                        let _ = done.send((*key, recipe.make(device, cache)));
                    }
                });
            }
            drop(done);
            for (count, (key, pipeline)) in made.iter().enumerate() {
                if let Ok(pipeline) = pipeline {
                    self.insert(key, pipeline);
                }
                progress(count + 1, total);
            }
        });
        self.keep();
    }

    /// Writes what the driver made of new pipelines to the folder.
    pub fn keep(&mut self) {
        if let Some(kept) = self.kept.as_mut().filter(|kept| kept.new) {
            kept.new = false;
            if let Some(bytes) = kept.made.get_data() {
                kept.folder.put(&kept.entry, &bytes);
            }
        }
    }

    fn recipe(&mut self, kernel: &Kernel, access: Access) -> Result<Recipe, String> {
        let shader = kernel.shader();
        let key = (shader.name, kernel.types);
        let module = match self.modules.get(&key) {
            Some(module) => module.clone(),
            None => {
                let module = self.module(kernel)?;
                self.modules.entry(key).or_insert(module).clone()
            }
        };
        Ok(Recipe { kernel: *kernel, module, layout: self.layout(access).pipeline.clone() })
    }

    fn module(&self, kernel: &Kernel) -> Result<wgpu::ShaderModule, String> {
        let shader = kernel.shader();
        let scope = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let descriptor = wgpu::ShaderModuleDescriptor {
            label: Some(shader.name),
            source: wgpu::ShaderSource::Wgsl(shader.source(&kernel.types).into()),
        };
        // SAFETY: shaders keep to the sizes that the host has checked, clamp every index that comes out of a buffer, and end
        // every loop.
        let module =
            unsafe { self.device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) };
        complete(scope.pop()).map_or(Ok(module), |error| Err(format!("{}.wgsl: {error}", shader.name)))
    }
}

impl Kept {
    fn open(device: &wgpu::Device, folder: Cache, entry: String) -> Self {
        let bytes = folder.get(&entry);
        let descriptor = wgpu::PipelineCacheDescriptor { label: Some("h1"), data: bytes.as_deref(), fallback: true };
        // SAFETY: the bytes came from `get_data`, unchanged by their hash, under a name that has the driver's version; the
        // driver checks again that they are its own, and what is not starts afresh.
        let made = unsafe { device.create_pipeline_cache(&descriptor) };
        Kept { made, folder, entry, new: false }
    }
}

impl Drop for Pipelines {
    fn drop(&mut self) {
        self.keep();
    }
}
