//! Commands: dispatches recorded one after the other into a pass, handed to the queue when there are many, or when the
//! host writes or reads.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::adapter::Abilities;
use super::memory::{Memory, Window};
use super::pipelines::{Access, PARAMETERS, Pipelines};
use crate::backend::{BufferId, Result};

/// Dispatches of a submission at most.
const MOST_DISPATCHES: u64 = 512;
/// Bind groups that are kept at most.
const MOST_GROUPS: usize = 8192;

/// What was handed to a device so far; clones count the same device.
#[derive(Clone, Debug, Default)]
pub struct Counters(Arc<[AtomicU64; 2]>);

impl Counters {
    /// Dispatches recorded.
    pub fn dispatches(&self) -> u64 {
        self.0[0].load(Ordering::Relaxed)
    }

    /// Submissions to the queue.
    pub fn submissions(&self) -> u64 {
        self.0[1].load(Ordering::Relaxed)
    }

    fn count(&self, which: usize) {
        self.0[which].fetch_add(1, Ordering::Relaxed);
    }
}

/// A group of tensors by its layout and its windows.
#[derive(PartialEq, Eq, Hash)]
struct GroupKey(Access, Vec<(BufferId, u64, u64)>);

/// The commands that the queue has not seen yet.
pub(super) struct Recorder {
    device: wgpu::Device,
    queue: wgpu::Queue,
    /// The pass before the encoder that it records into, so that it ends first.
    pass: Option<wgpu::ComputePass<'static>>,
    encoder: Option<wgpu::CommandEncoder>,
    /// The uniform blocks of the dispatches recorded, each at a multiple of `block` bytes.
    blocks: Vec<u8>,
    block: u64,
    ring: wgpu::Buffer,
    ring_group: wgpu::BindGroup,
    groups: HashMap<GroupKey, wgpu::BindGroup>,
    last: Option<wgpu::SubmissionIndex>,
    counters: Counters,
}

fn entry(binding: u32, window: &Window) -> wgpu::BindGroupEntry<'_> {
    let Window { raw: buffer, start, size, .. } = window;
    let resource = wgpu::BufferBinding { buffer, offset: *start, size: wgpu::BufferSize::new(*size) };
    wgpu::BindGroupEntry { binding, resource: wgpu::BindingResource::Buffer(resource) }
}

impl Recorder {
    pub fn new(
        device: &wgpu::Device,
        queue: &wgpu::Queue,
        abilities: &Abilities,
        memory: &Memory,
        pipelines: &Pipelines,
    ) -> Result<Self> {
        let block = PARAMETERS.next_multiple_of(abilities.alignment.1);
        let usage = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST;
        let ring = memory.raw("parameters of dispatches", block * MOST_DISPATCHES, usage)?;
        let binding = wgpu::BufferBinding { buffer: &ring, offset: 0, size: wgpu::BufferSize::new(PARAMETERS) };
        let ring_group = device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: Some("parameters"),
            layout: pipelines.parameters(),
            entries: &[wgpu::BindGroupEntry { binding: 0, resource: wgpu::BindingResource::Buffer(binding) }],
        });
        Ok(Recorder {
            device: device.clone(),
            queue: queue.clone(),
            pass: None,
            encoder: None,
            blocks: Vec::new(),
            block,
            ring,
            ring_group,
            groups: HashMap::new(),
            last: None,
            counters: Counters::default(),
        })
    }

    /// What was handed over so far.
    pub fn counters(&self) -> Counters {
        self.counters.clone()
    }

    /// Forgets the groups that hold a buffer.
    pub fn forget(&mut self, buffer: BufferId) {
        self.groups.retain(|GroupKey(_, windows), _| windows.iter().all(|(id, _, _)| *id != buffer));
    }

    fn encoder(&mut self) -> &mut wgpu::CommandEncoder {
        let device = &self.device;
        self.encoder.get_or_insert_with(|| device.create_command_encoder(&Default::default()))
    }

    /// Records a dispatch: its windows in the order of the bindings, its uniform block, its grid.
    pub fn dispatch(
        &mut self,
        pipelines: &mut Pipelines,
        pipeline: &wgpu::ComputePipeline,
        access: Access,
        windows: &[Window],
        block: &[u32],
        grid: [u32; 3],
    ) {
        let key = GroupKey(access, windows.iter().map(|w| (w.id, w.place, w.size)).collect());
        if self.groups.len() > MOST_GROUPS {
            self.groups.clear();
        }
        let device = &self.device;
        let group = self.groups.entry(key).or_insert_with(|| {
            let entries: Vec<_> = (0..).zip(windows).map(|(binding, window)| entry(binding, window)).collect();
            device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: None,
                layout: pipelines.tensors(access),
                entries: &entries,
            })
        });
        let group = group.clone();
        let offset = self.blocks.len() as u32;
        self.blocks.extend_from_slice(bytemuck::cast_slice(block));
        self.blocks.resize(offset as usize + self.block as usize, 0);
        if self.pass.is_none() {
            let pass = self.encoder().begin_compute_pass(&Default::default()).forget_lifetime();
            self.pass = Some(pass);
        }
        if let Some(pass) = &mut self.pass {
            pass.set_pipeline(pipeline);
            pass.set_bind_group(0, &group, &[]);
            pass.set_bind_group(1, &self.ring_group, &[offset]);
            pass.dispatch_workgroups(grid[0], grid[1], grid[2]);
        }
        self.counters.count(0);
        if self.blocks.len() as u64 >= self.block * MOST_DISPATCHES {
            self.submit();
        }
    }

    /// Records a copy of bytes, all numbers multiples of 4.
    pub fn copy(&mut self, from: (&wgpu::Buffer, u64), to: (&wgpu::Buffer, u64), bytes: u64) {
        self.pass = None;
        self.encoder().copy_buffer_to_buffer(from.0, from.1, to.0, to.1, bytes);
    }

    /// Hands what was recorded to the queue.
    pub fn submit(&mut self) {
        self.pass = None;
        if let Some(encoder) = self.encoder.take() {
            if !self.blocks.is_empty() {
                self.queue.write_buffer(&self.ring, 0, &self.blocks);
                self.blocks.clear();
            }
            self.last = Some(self.queue.submit([encoder.finish()]));
            self.counters.count(1);
        }
    }

    /// The last submission.
    pub fn last(&self) -> Option<wgpu::SubmissionIndex> {
        self.last.clone()
    }

    /// Writes bytes after everything recorded so far; offset and length are multiples of 4.
    pub fn write(&mut self, to: &wgpu::Buffer, offset: u64, bytes: &[u8]) {
        self.submit();
        self.queue.write_buffer(to, offset, bytes);
    }
}
