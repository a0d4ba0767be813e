//! Which of the ranked layers become Mamba next.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::{Error, Result};
use crate::hybrid::LayerSet;

/// How far replaced layers stand from each other. Scores are of one layer at a time, and so the order likes to take
/// neighbours, which hurt more together than apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Placement {
    /// The longest run of neighbouring Mamba layers, as long as there are other layers to take; no limit if left out.
    pub max_run: Option<usize>,
}

impl Placement {
    /// The `count` layers to replace next: the first of `order` (least important first) that lengthen no run of Mamba
    /// layers beyond the limit, those of `taken` included. Where too few are left, the limit gives way by one layer at a
    /// time.
    ///
    /// # Errors
    /// When `order` has fewer layers than that.
    pub fn choose(self, order: &[usize], taken: &LayerSet, count: usize) -> Result<LayerSet> {
        let left: Vec<usize> = order.iter().copied().filter(|layer| !taken.contains(*layer)).collect();
        if left.len() < count {
            let what = format!("{count} more layers were to become Mamba, but only {} are left", left.len());
            return Err(Error::Configuration(what));
        }
        let mut mamba: BTreeSet<usize> = taken.iter().collect();
        let mut chosen = BTreeSet::new();
        let mut limit = self.max_run.unwrap_or(usize::MAX).max(1);
        while chosen.len() < count {
            for layer in &left {
                if chosen.len() < count && !chosen.contains(layer) && run_with(&mamba, *layer) <= limit {
                    chosen.insert(*layer);
                    mamba.insert(*layer);
                }
            }
            limit = limit.saturating_add(1);
        }
        Ok(chosen.into_iter().collect())
    }
}

/// The length of the run that `layer` would stand in.
fn run_with(mamba: &BTreeSet<usize>, layer: usize) -> usize {
    let above = (layer + 1..).take_while(|next| mamba.contains(next)).count();
    let below = (0..layer).rev().take_while(|next| mamba.contains(next)).count();
    below + 1 + above
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LOO: [usize; 8] = [4, 6, 3, 5, 7, 2, 1, 0];

    fn choose(max_run: Option<usize>, taken: &[usize], count: usize) -> Vec<usize> {
        let taken: LayerSet = taken.iter().copied().collect();
        Placement { max_run }.choose(&LOO, &taken, count).unwrap().iter().collect()
    }

    #[test]
    fn without_a_limit_the_least_important_are_taken() {
        assert_eq!(choose(None, &[], 4), [3, 4, 5, 6]);
        assert_eq!(choose(None, &[6], 2), [3, 4]);
        assert_eq!(choose(None, &[], 0), [] as [usize; 0]);
    }

    #[test]
    fn a_limit_spaces_layers_and_gives_way_where_none_is_left() {
        assert_eq!(choose(Some(1), &[], 3), [2, 4, 6]);
        assert_eq!(choose(Some(2), &[], 4), [3, 4, 6, 7]);
        assert_eq!(choose(Some(1), &[], 5), [0, 2, 4, 6, 7]);
        assert_eq!(choose(Some(1), &[], 8), [0, 1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn more_layers_than_there_are_is_an_error() {
        let taken = LayerSet::from_iter([4]);
        assert!(Placement::default().choose(&LOO, &taken, 8).is_err());
    }

    proptest! {
        #[test]
        fn the_chosen_are_as_many_as_asked_for_and_new(
            order in Just((0..12).collect::<Vec<usize>>()).prop_shuffle(),
            taken in prop::collection::btree_set(0_usize..12, 0..6),
            share in 0.0..=1.0,
            limit in prop::option::of(1_usize..5),
        ) {
            let count = ((12 - taken.len()) as f64 * share) as usize;
            let taken: LayerSet = taken.into_iter().collect();
            let chosen = Placement { max_run: limit }.choose(&order, &taken, count).unwrap();
            prop_assert_eq!(chosen.len(), count);
            prop_assert!(chosen.iter().all(|layer| !taken.contains(layer)));
        }
    }
}
