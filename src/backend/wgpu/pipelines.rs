//! Pipelines, each made once: by kernel, and by which of its bindings are written.

use std::collections::HashMap;

use super::adapter::complete;
use super::shaders::{Kernel, MOST_TYPES};
use crate::backend::DType;

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
    pub fn new(device: &wgpu::Device) -> Self {
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
        let scopes = [wgpu::ErrorFilter::OutOfMemory, wgpu::ErrorFilter::Internal, wgpu::ErrorFilter::Validation];
        let scopes = scopes.map(|filter| self.device.push_error_scope(filter));
        let pipeline = self.make(kernel, access);
        let mut error = None;
        for scope in scopes.into_iter().rev() {
            error = complete(scope.pop()).or(error);
        }
        if let Some(error) = error {
            return Err(format!("{}.wgsl, {}: {error}", kernel.shader().name, kernel.entry));
        }
        self.pipelines.insert((*kernel, access), pipeline.clone());
        Ok(pipeline)
    }

    fn make(&mut self, kernel: &Kernel, access: Access) -> wgpu::ComputePipeline {
        let shader = kernel.shader();
        let device = self.device.clone();
        let module = self.modules.entry((shader.name, kernel.types)).or_insert_with(|| {
            let descriptor = wgpu::ShaderModuleDescriptor {
                label: Some(shader.name),
                source: wgpu::ShaderSource::Wgsl(shader.source(&kernel.types).into()),
            };
            // SAFETY: shaders keep to the sizes that the host has checked, clamp every index that comes out of a buffer,
            // and end every loop.
            unsafe { device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) }
        });
        let module = module.clone();
        let layout = self.layout(access);
        device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(kernel.entry),
            layout: Some(&layout.pipeline),
            module: &module,
            entry_point: Some(kernel.entry),
            compilation_options: wgpu::PipelineCompilationOptions {
                constants: &kernel.constants(),
                zero_initialize_workgroup_memory: false,
            },
            cache: None,
        })
    }
}
