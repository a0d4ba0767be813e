//! The choice of a backend by name, and the reason why one cannot be used.

use std::num::NonZeroUsize;

use super::reference::Reference;
use super::{Backend, Device, Error, Result, cpu, cuda, wgpu};

/// A backend as asked for on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Name {
    /// The fastest that is there.
    Auto,
    /// NVIDIA cards.
    Cuda,
    /// Any Vulkan, Metal or DX12 card.
    Wgpu,
    /// This machine's processor.
    Cpu,
    /// The plain formulas in f64.
    Reference,
}

/// The backends, the fastest first.
pub const ALL: [Name; 4] = [Name::Cuda, Name::Wgpu, Name::Cpu, Name::Reference];

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Name::Auto => "auto",
            Name::Cuda => "cuda",
            Name::Wgpu => "wgpu",
            Name::Cpu => "cpu",
            Name::Reference => "reference",
        })
    }
}

impl std::str::FromStr for Name {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        let all = ALL.into_iter().chain([Name::Auto]);
        all.into_iter()
            .find(|known| known.to_string() == name)
            .ok_or_else(|| format!("unknown backend '{name}': expected auto, cuda, wgpu, cpu or reference"))
    }
}

/// Opens a backend; `threads` is for `cpu`, all cores where it is `None`.
///
/// # Errors
/// When the backend is not in this build, or cannot be used on this machine.
pub fn open(name: Name, threads: Option<NonZeroUsize>) -> Result<Device> {
    match name {
        Name::Auto => cuda::device().or_else(|_no_card| match wgpu::describe() {
            Ok((_, true)) => wgpu::device(),
            _ => cpu::device(threads),
        }),
        Name::Cuda => cuda::device(),
        Name::Wgpu => wgpu::device(),
        Name::Cpu => cpu::device(threads),
        Name::Reference => Ok(Device::new(Reference::new())),
    }
}

/// Opens a backend whose outputs for a token are the same bits however its sequence is cut into calls and whatever shares
/// them; auto takes the fastest that has such a mode.
///
/// # Errors
/// As [`open`], and when the backend has no such mode.
pub fn open_batch_invariant(name: Name, threads: Option<NonZeroUsize>) -> Result<Device> {
    let on_wgpu = || wgpu::device_with(&wgpu::Options { batch_invariant: true, ..Default::default() });
    let device = match name {
        Name::Auto => match wgpu::describe() {
            Ok((_, true)) => on_wgpu()?.0,
            _ => cpu::device(threads)?,
        },
        Name::Wgpu => on_wgpu()?.0,
        Name::Cuda | Name::Cpu | Name::Reference => open(name, threads)?,
    };
    if device.info().batch_invariant {
        return Ok(device);
    }
    let why = "it has no batch-invariant mode; wgpu and cpu do".into();
    Err(Error::Unavailable { backend: name.to_string(), why })
}

/// The backends, the fastest first, each with the device that it would run on or the reason why it cannot be used.
pub fn list(threads: Option<NonZeroUsize>) -> Vec<(Name, Result<String>)> {
    let found = |name| match name {
        Name::Auto | Name::Cpu => Ok(cpu::describe(threads)),
        Name::Reference => Ok(Reference::new().info().device.clone()),
        Name::Cuda => cuda::describe(),
        Name::Wgpu => wgpu::describe().map(|(device, _)| device),
    };
    ALL.into_iter().map(|name| (name, found(name))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for name in ALL.into_iter().chain([Name::Auto]) {
            assert_eq!(name.to_string().parse(), Ok(name));
        }
        assert!("gpu".parse::<Name>().unwrap_err().contains("gpu"));
    }

    #[test]
    fn a_backend_without_a_batch_invariant_mode_says_so() {
        let threads = NonZeroUsize::new(1);
        assert!(open_batch_invariant(Name::Cpu, threads).unwrap().info().batch_invariant);
        let refused = open_batch_invariant(Name::Reference, threads).unwrap_err().to_string();
        assert!(refused.contains("no batch-invariant mode"), "{refused}");
    }

    #[test]
    fn every_backend_is_listed_with_a_device_or_a_reason() {
        for (name, found) in list(NonZeroUsize::new(2)) {
            match found {
                Ok(device) => assert!(!device.is_empty(), "{name}"),
                Err(Error::Unavailable { backend, .. }) => assert_eq!(backend, name.to_string()),
                Err(error) => panic!("{name}: {error}"),
            }
        }
    }
}
