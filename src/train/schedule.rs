//! The learning rate of each step.

/// Warm-up, a constant part, then a straight line down to a minimum that stays. With no constant part this is
/// Fast-LLM's linear schedule (`fast_llm/engine/optimizer/learning_rate.py`).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// The rate between warm-up and decay.
    pub base: f64,
    /// The rate from `end` on.
    pub minimum: f64,
    /// Steps of warm-up: step s of them has `base·s / warmup`.
    pub warmup: u64,
    /// The last step with the whole of `base`; never before the end of the warm-up.
    pub hold: u64,
    /// The first step with `minimum`.
    pub end: u64,
}

impl Schedule {
    /// The rate of `step`, counted from 1.
    pub fn rate(&self, step: u64) -> f64 {
        if step <= self.warmup {
            return self.base * step as f64 / self.warmup as f64;
        }
        let hold = self.hold.max(self.warmup);
        match (step <= hold, step < self.end) {
            (true, _) => self.base,
            (_, true) => self.base + (self.minimum - self.base) * (step - hold) as f64 / (self.end - hold) as f64,
            _ => self.minimum,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn fast_llms_linear_schedule_counts_steps_from_one() {
        let schedule = Schedule { base: 8.0, minimum: 0.0, warmup: 4, hold: 0, end: 8 };
        let rates: Vec<f64> = (1..=10).map(|step| schedule.rate(step)).collect();
        assert_eq!(rates, [2.0, 4.0, 6.0, 8.0, 6.0, 4.0, 2.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn a_rate_that_is_held_stays_until_its_share_and_ends_at_the_minimum() {
        let schedule = Schedule { base: 1.0, minimum: 0.2, warmup: 0, hold: 3, end: 5 };
        let rates: Vec<f64> = (1..=6).map(|step| schedule.rate(step)).collect();
        assert_eq!(rates, [1.0, 1.0, 1.0, 0.6, 0.2, 0.2]);
    }

    proptest! {
        #[test]
        fn a_rate_is_never_over_the_base_nor_under_zero(
            step in 1..100_u64, warmup in 0..50_u64, hold in 0..80_u64, end in 0..90_u64, share in 0.0..=1.0
        ) {
            let rate = Schedule { base: 1.0, minimum: share, warmup, hold, end }.rate(step);
            prop_assert!((0.0..=1.0).contains(&rate));
            prop_assert!(step > warmup.max(hold).max(end) || step <= warmup || rate >= share);
        }
    }
}
