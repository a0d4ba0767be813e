//! Times of what runs on a device.

use std::time::{Duration, Instant};

use crate::backend::{self, Buffer, DType, Device};

/// A run of the clock is so long at least, in seconds, so that reading the time costs nothing beside it.
const LEAST: f64 = 2e-3;

/// Takes the time of work on a device.
#[derive(Debug)]
pub struct Clock {
    device: Device,
    /// A value whose reading waits for all that was launched before.
    touch: Buffer,
    budget: Duration,
}

impl Clock {
    /// A clock that spends about `budget` on each time.
    ///
    /// # Errors
    /// When the device fails.
    pub fn new(device: &Device, budget: Duration) -> backend::Result<Self> {
        Ok(Clock { device: device.clone(), touch: device.alloc(DType::F32, 1, 1)?, budget })
    }

    /// Waits until the device has done all that it was given.
    ///
    /// # Errors
    /// When the device was lost.
    pub fn wait(&self) -> backend::Result<()> {
        self.device.read(self.touch.view())?.wait().map(drop)
    }

    /// Seconds of one `run` by the device's own clock where it has one, the best of several after a first one that is not counted.
    ///
    /// # Errors
    /// What `run` fails with.
    pub fn best(&self, mut run: impl FnMut() -> backend::Result<()>) -> backend::Result<f64> {
        run()?;
        self.wait()?;
        let begun = Instant::now();
        let (mut best, mut count) = (f64::INFINITY, 1_u32);
        loop {
            let start = Instant::now();
            let on_device = self.device.seconds_of(|| (0..count).try_for_each(|_| run()))?;
            self.wait()?;
            let seconds = start.elapsed().as_secs_f64();
            if seconds < LEAST && count < 1 << 20 {
                count *= 2;
                continue;
            }
            best = best.min(on_device.unwrap_or(seconds) / f64::from(count));
            if begun.elapsed() >= self.budget {
                return Ok(best);
            }
        }
    }
}
