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
pub struct Counters(Arc<[AtomicU64; 3]>);

impl Counters {
    /// Dispatches recorded.
    pub fn dispatches(&self) -> u64 {
        self.0[0].load(Ordering::Relaxed)
    }

    /// Submissions to the queue.
    pub fn submissions(&self) -> u64 {
        self.0[1].load(Ordering::Relaxed)
    }

    /// Pipelines made.
    pub fn pipelines(&self) -> u64 {
        self.0[2].load(Ordering::Relaxed)
    }

    pub(super) fn count_pipeline(&self) {
        self.count(2);
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
    clock: Option<Clock>,
}

/// Two moments on the device.
#[derive(Clone)]
struct Clock {
    moments: wgpu::QuerySet,
    /// Their ticks, two u64.
    ticks: wgpu::Buffer,
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
        counters: Counters,
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
        let clock = || {
            let descriptor = wgpu::QuerySetDescriptor { label: None, ty: wgpu::QueryType::Timestamp, count: 2 };
            let usage = wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC;
            let moments = device.create_query_set(&descriptor);
            memory.raw("ticks of a clock", 16, usage).map(|ticks| Clock { moments, ticks })
        };
        let clock = abilities.timestamps.then(clock).transpose()?;
        Ok(Recorder {
            clock,
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
            counters,
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

    fn pass(&mut self) -> &mut wgpu::ComputePass<'static> {
        let pass = self.pass.take();
        let pass = pass.unwrap_or_else(|| self.encoder().begin_compute_pass(&Default::default()).forget_lifetime());
        self.pass.insert(pass)
    }

    /// Notes the moment at which everything recorded so far is done; false where the device cannot tell.
    pub fn start_clock(&mut self) -> bool {
        self.submit();
        self.mark(0).is_some()
    }

    /// Notes the moment at which everything since is done: the ticks of both, and the nanoseconds of a tick.
    pub fn stop_clock(&mut self) -> Option<(wgpu::Buffer, f32)> {
        let Clock { moments, ticks } = self.mark(1)?;
        self.pass = None;
        self.encoder().resolve_query_set(&moments, 0..2, &ticks, 0);
        Some((ticks, self.queue.get_timestamp_period()))
    }

    fn mark(&mut self, moment: u32) -> Option<Clock> {
        let clock = self.clock.clone()?;
        self.pass().write_timestamp(&clock.moments, moment);
        Some(clock)
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
        let ring_group = self.ring_group.clone();
        let pass = self.pass();
        pass.set_pipeline(pipeline);
        pass.set_bind_group(0, &group, &[]);
        pass.set_bind_group(1, &ring_group, &[offset]);
        pass.dispatch_workgroups(grid[0], grid[1], grid[2]);
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
