//! The choice of a backend by name, and the reason why one cannot be used.

use std::num::NonZeroUsize;

use super::reference::Reference;
use super::{Device, Error, Result};

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

impl std::str::FromStr for Name {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        match name {
            "auto" => Ok(Name::Auto),
            "cuda" => Ok(Name::Cuda),
            "wgpu" => Ok(Name::Wgpu),
            "cpu" => Ok(Name::Cpu),
            "reference" => Ok(Name::Reference),
            _ => Err(format!("unknown backend '{name}': expected auto, cuda, wgpu, cpu or reference")),
        }
    }
}

/// Opens a backend; `threads` is for `cpu`, all cores where it is `None`.
///
/// # Errors
/// When the backend is not in this build, or cannot be used on this machine.
pub fn open(name: Name, threads: Option<NonZeroUsize>) -> Result<Device> {
    let _ = threads;
    let missing = |backend: &str| {
        let why = "this build of h1 does not have it yet; cpu and reference work".into();
        Err(Error::Unavailable { backend: backend.into(), why })
    };
    match name {
        Name::Reference => Ok(Device::new(Reference::new())),
        Name::Auto | Name::Cpu => missing("cpu"),
        Name::Cuda => missing("cuda"),
        Name::Wgpu => missing("wgpu"),
    }
}
