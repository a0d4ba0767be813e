//! Quantised blocks to numbers: every value of a block is `scale · q + offset`, `q` a few bits wide.
//!
//! Source of the layouts: `ggml-common.h` and `ggml-quants.c` of ggml. Halves are IEEE f16, little-endian; products and
//! sums are f32 in the order of the formulas beside them.

use half::f16;

use crate::checkpoint::storage::Storage;

/// Values of a block with one scale.
const SMALL: usize = 32;
/// Values of a block with scales within.
const LARGE: usize = 256;
/// Values that share one of the scales within a Q4_K or Q5_K block.
const GROUP: usize = 32;

/// Whole blocks as f32; `false` when the storage is not quantised. `out` has the values of the blocks of `bytes`.
pub(in crate::checkpoint) fn decode(storage: Storage, bytes: &[u8], out: &mut [f32]) -> bool {
    match storage {
        Storage::Q4_0 => each(bytes, out, q4_0),
        Storage::Q4_1 => each(bytes, out, q4_1),
        Storage::Q5_0 => each(bytes, out, q5_0),
        Storage::Q5_1 => each(bytes, out, q5_1),
        Storage::Q8_0 => each(bytes, out, q8_0),
        Storage::Q4_K => each(bytes, out, q4_k),
        Storage::Q5_K => each(bytes, out, q5_k),
        Storage::Q6_K => each(bytes, out, q6_k),
        _ => return false,
    }
    true
}

fn each<const BYTES: usize, const VALUES: usize>(
    bytes: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; BYTES], &mut [f32; VALUES]),
) {
    for (block, out) in bytes.as_chunks::<BYTES>().0.iter().zip(out.as_chunks_mut::<VALUES>().0) {
        decode(block, out);
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// f16 d, 16 bytes: `d · (q − 8)`. The low four bits of a byte are a value of the first half, the high ones of the second.
fn q4_0(block: &[u8; 18], out: &mut [f32; SMALL]) {
    let d = half_at(block, 0);
    nibbles(&block[2..], out, |_, q| d * (f32::from(q) - 8.0));
}

/// f16 d, f16 m, 16 bytes: `d · q + m`.
fn q4_1(block: &[u8; 20], out: &mut [f32; SMALL]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    nibbles(&block[4..], out, |_, q| d * f32::from(q) + m);
}

/// f16 d, 32 fifth bits, 16 bytes: `d · (q − 16)`.
fn q5_0(block: &[u8; 22], out: &mut [f32; SMALL]) {
    let d = half_at(block, 0);
    nibbles(&block[6..], out, |i, q| d * (f32::from(q | fifth(&block[2..6], i)) - 16.0));
}

/// f16 d, f16 m, 32 fifth bits, 16 bytes: `d · q + m`.
fn q5_1(block: &[u8; 24], out: &mut [f32; SMALL]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    nibbles(&block[8..], out, |i, q| d * f32::from(q | fifth(&block[4..8], i)) + m);
}

/// f16 d, 32 signed bytes: `d · q`.
fn q8_0(block: &[u8; 34], out: &mut [f32; SMALL]) {
    let d = half_at(block, 0);
    for (out, q) in out.iter_mut().zip(&block[2..]) {
        *out = d * f32::from(*q as i8);
    }
}

/// `value(place, four bits)` for each of the values that the bytes `packed` hold, two a byte.
fn nibbles(packed: &[u8], out: &mut [f32], value: impl Fn(usize, u8) -> f32) {
    let half = packed.len();
    for (i, q) in packed.iter().enumerate() {
        out[i] = value(i, q & 15);
        out[i + half] = value(i + half, q >> 4);
    }
}

/// Bit `i` of a row of bits, at the place of the fifth bit of a value.
fn fifth(bits: &[u8], i: usize) -> u8 {
    (bits[i / 8] >> (i % 8) & 1) << 4
}

/// f16 d, f16 dmin, 12 bytes of scales, 128 bytes: `(d · scale) · q − (dmin · min)`, a scale and a min for each group of 32.
fn q4_k(block: &[u8; 144], out: &mut [f32; LARGE]) {
    groups(&block[..16], &block[16..], out, |_, _, q| q);
}

/// f16 d, f16 dmin, 12 bytes of scales, 32 bytes of fifth bits, 128 bytes: as Q4_K. Bit `g` of fifth-bit byte `i` belongs to
/// value `i` of group `g`.
fn q5_k(block: &[u8; 176], out: &mut [f32; LARGE]) {
    let high = &block[16..48];
    groups(&block[..16], &block[48..], out, |group, i, q| q | (high[i] >> group & 1) << 4);
}

/// The common part of Q4_K and Q5_K: `whole(group, place in it, four bits)` is the value before scaling. 32 bytes of `packed` are
/// two groups, the first in the low bits.
fn groups(head: &[u8], packed: &[u8], out: &mut [f32; LARGE], whole: impl Fn(usize, usize, u8) -> u8) {
    let (d, dmin) = (half_at(head, 0), half_at(head, 2));
    for (pair, packed) in packed.chunks_exact(GROUP).enumerate() {
        let (low, high) = out[2 * pair * GROUP..2 * (pair + 1) * GROUP].split_at_mut(GROUP);
        for (group, out, shift) in [(2 * pair, low, 0), (2 * pair + 1, high, 4)] {
            let (scale, min) = scale_and_min(&head[4..], group);
            let (scale, min) = (d * f32::from(scale), dmin * f32::from(min));
            for (i, (out, q)) in out.iter_mut().zip(packed).enumerate() {
                *out = scale * f32::from(whole(group, i, q >> shift & 15)) - min;
            }
        }
    }
}

/// Six bits each. Groups 0 to 3 lie in the low bits of bytes 0..4 (scales) and 4..8 (mins); groups 4 to 7 have their low four
/// bits in bytes 8..12 and their high two on top of bytes 0..8.
fn scale_and_min(scales: &[u8], group: usize) -> (u8, u8) {
    match group {
        0..4 => (scales[group] & 63, scales[group + 4] & 63),
        _ => {
            let (low, scale, min) = (scales[group + 4], scales[group - 4], scales[group]);
            (low & 15 | scale >> 6 << 4, low >> 4 | min >> 6 << 4)
        }
    }
}

/// 128 bytes of low four bits, 64 bytes of high two bits, 16 signed scales, f16 d: `d · scale · (q − 32)`, a scale for each 16
/// values.
fn q6_k(block: &[u8; 210], out: &mut [f32; LARGE]) {
    let (low, high, scales, d) = (&block[..128], &block[128..192], &block[192..208], half_at(block, 208));
    for (i, out) in out.iter_mut().enumerate() {
        // Each half of 128 values is four runs of 32: runs 0 and 1 in the low bits of 64 bytes, 2 and 3 in the high bits.
        let (half, run, place) = (i / 128, i / 32 % 4, i % 32);
        let four = low[64 * half + 32 * (run % 2) + place] >> (4 * (run / 2)) & 15;
        let two = high[32 * half + place] >> (2 * run) & 3;
        let scale = f32::from(scales[i / 16] as i8);
        *out = d * scale * (f32::from(four | two << 4) - 32.0);
    }
}
