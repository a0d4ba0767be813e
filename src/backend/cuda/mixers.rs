//! Convolution, scan and attention: launches of their kernels.

mod attention;
mod conv;
mod scan;

pub(super) use attention::{AGREES, attention, attention_backward};
pub(super) use conv::{conv1d, conv1d_backward};
pub(super) use scan::{SCAN_CHUNK, conv_scan, selective_scan, selective_scan_backward};

use super::driver::Limits;
use super::source::{self, ModuleKey, Value};
use crate::backend::Largest;

/// Bytes of shared memory that a block has beside what it is launched with.
const RESERVED_BYTES: usize = 1024;

/// The architecture of an H100.
const H100: (u32, u32) = (9, 0);

/// Bytes of scratch that calls of these sizes take.
pub(super) fn scratch_bytes(limits: &Limits, largest: &Largest) -> usize {
    conv::scratch_bytes(largest)
        .max(scan::scratch_bytes(limits, largest))
        .max(attention::scratch_bytes(limits, largest))
}

/// The modules that calls ask for as a rule on a card of an architecture: activations of one storage type, parameters of
/// any.
pub(super) fn variants(capability: (u32, u32)) -> Vec<ModuleKey> {
    let types = ["float", "bf16", "f16"].map(Value::Type);
    let alike = |source, names: &[&'static str], of: Value, more: &[(&'static str, Value)]| {
        let defines: Vec<_> = names.iter().map(|&name| (name, of)).chain(more.iter().copied()).collect();
        ModuleKey::new(source, &defines)
    };
    let mut all = Vec::new();
    for of in types {
        for weight in types {
            let more = [("T_W", weight), ("TAPS", Value::Number(4)), ("REPEAT", Value::Number(4))];
            for pack in [1, 2] {
                let unit = [&more[..], &[("PACK", Value::Number(pack))]].concat();
                all.push(alike(&source::CONV1D, &["T_X", "T_OUT"], of, &unit));
            }
            all.push(alike(&source::CONV1D_BACKWARD, &["T_X", "T_DOUT", "T_DX"], of, &more));
        }
        for [forward, backward] in scan::layouts() {
            all.push(alike(&source::SELECTIVE_SCAN, &["T_U", "T_DELTA", "T_P", "T_OUT"], of, &forward));
            let names = ["T_U", "T_DELTA", "T_P", "T_DOUT", "T_DU", "T_DDELTA", "T_DP"];
            all.push(alike(&source::SELECTIVE_SCAN_BACKWARD, &names, of, &backward));
        }
        for d_state in [16, 32, 64, 128, 256].map(|states| ("D_STATE", Value::Number(states))) {
            let names = ["T_U", "T_DELTA", "T_P", "T_OUT"];
            all.push(alike(&source::SELECTIVE_SCAN_STEP, &names, of, &[d_state]));
            for weight in types {
                let conv = [("TAPS", Value::Number(4)), ("HEAD", Value::Number(16)), ("T_X", of), ("T_W", weight)];
                let more = [&[d_state], &conv[..]].concat();
                all.push(alike(&source::SELECTIVE_SCAN_STEP, &names, of, &more));
            }
            for (back, vector) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                let more = [d_state, ("BACK", Value::Number(back)), ("VECTOR", Value::Number(vector))];
                all.push(alike(&source::SCAN_PARTS, &["T_X", "T_DELTA", "T_P"], of, &more));
            }
        }
        all.push(alike(&source::SCAN_SUMS, &["T_DP"], of, &[]));
        for head_dim in [64, 80, 128].map(|size| ("HEAD_DIM", Value::Number(size))) {
            for rows in attention::PLAIN_ROWS {
                let more = [head_dim, ("ROWS", Value::Number(rows as u32))];
                all.push(alike(&source::ATTENTION, &["T_Q", "T_KV", "T_OUT"], of, &more));
                let names = ["T_Q", "T_KV", "T_OUT", "T_DOUT", "T_DQ", "T_DKV"];
                all.push(alike(&source::ATTENTION_BACKWARD, &names, of, &more));
            }
            all.push(alike(&source::ATTENTION_COMBINE, &["T_OUT"], of, &[head_dim]));
        }
    }
    for of in &types[1..] {
        for cut in [0, 1].map(|cut| ("CUT", Value::Number(cut))) {
            all.push(alike(&source::SELECTIVE_SCAN16, &["T_U", "T_DELTA", "T_P", "T_OUT"], *of, &[cut]));
            let names = ["T_U", "T_DELTA", "T_P", "T_DOUT", "T_DU", "T_DDELTA", "T_DP"];
            for of_b in [*of, types[0]] {
                let more = [("T_DB", of_b), ("T_DC", *of), cut];
                all.push(alike(&source::SELECTIVE_SCAN16_BACKWARD, &names, *of, &more));
            }
        }
        for size in [64, 128] {
            let head_dim = ("HEAD_DIM", Value::Number(size as u32));
            for (warps, tiles) in [(4, 2), (1, 1)] {
                let more = [head_dim, ("WARPS", Value::Number(warps)), ("M_TILES", Value::Number(tiles))];
                all.push(alike(&source::ATTENTION_MMA, &["T_X"], *of, &more));
            }
            all.push(alike(&source::ATTENTION_BACKWARD_MMA, &["T_X"], *of, &[head_dim]));
            if capability == H100 {
                let forward = [false, true].map(|paged| attention::forward_module(*of, size, paged));
                all.extend(forward.into_iter().take(if size == 64 { 1 } else { 2 }));
                all.push(alike(&source::ATTENTION_BACKWARD_WGMMA, &["T_X"], *of, &[head_dim]));
            }
        }
    }
    all
}
