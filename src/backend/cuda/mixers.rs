//! Convolution, scan and attention: launches of their kernels.

mod attention;
mod conv;
mod scan;

pub(super) use attention::{attention, attention_backward};
pub(super) use conv::{conv1d, conv1d_backward};
pub(super) use scan::{SCAN_CHUNK, selective_scan, selective_scan_backward};

use super::driver::Limits;
use crate::backend::Largest;

/// Bytes of scratch that calls of these sizes take.
pub(super) fn scratch_bytes(limits: &Limits, largest: &Largest) -> usize {
    conv::scratch_bytes(largest).max(scan::scratch_bytes(largest)).max(attention::scratch_bytes(limits, largest))
}
