//! Which ranges of device memory are handed out: bookkeeping alone, which touches no memory.

use std::collections::{BTreeMap, HashMap};

use super::driver::Pointer;
use crate::backend::Result;

/// What the start and the size of every range are multiples of, in bytes.
pub const ALIGNMENT: usize = 256;
/// Bytes of a piece that nobody planned, at least, where there is so much.
pub const PIECE: usize = 64 << 20;

/// Where pieces come from.
pub trait Pieces {
    /// So many bytes of device memory, aligned to [`ALIGNMENT`]; `None` where there is no room.
    ///
    /// # Errors
    /// When the device fails.
    fn make(&self, bytes: usize) -> Result<Option<Pointer>>;

    /// Takes back what starts here.
    ///
    /// # Errors
    /// When the device fails.
    fn take_back(&self, start: Pointer) -> Result<()>;

    /// Bytes that nobody has.
    ///
    /// # Errors
    /// When the device fails.
    fn free_bytes(&self) -> Result<usize>;
}

/// A piece of device memory.
#[derive(Debug)]
struct Piece {
    start: Pointer,
    bytes: usize,
    /// Bytes of each free range, by its start. No two touch each other.
    free: BTreeMap<Pointer, usize>,
    /// Bytes of each range that is out, by its start.
    taken: HashMap<Pointer, usize>,
}

/// Pieces of device memory in the order in which they came, and which ranges of them are out.
#[derive(Debug, Default)]
pub struct Arena(Vec<Piece>);

/// The bytes that a range of so many takes; even one of none has an address of its own.
pub fn rounded(bytes: usize) -> Option<usize> {
    bytes.max(1).checked_next_multiple_of(ALIGNMENT)
}

impl Piece {
    fn end(&self) -> Pointer {
        self.start + self.bytes as u64
    }

    /// The smallest free range that is large enough. The end of the piece comes after all others, so that the same
    /// calls get the same ranges of any piece that they fit into.
    fn take(&mut self, bytes: usize) -> Option<Pointer> {
        let is_end = |start, room| start + room as u64 == self.end();
        let large_enough = self.free.iter().filter(|&(_, &room)| room >= bytes);
        let (&start, &room) = large_enough.min_by_key(|&(&start, &room)| (is_end(start, room), room))?;
        self.free.remove(&start);
        if room > bytes {
            self.free.insert(start + bytes as u64, room - bytes);
        }
        self.taken.insert(start, bytes);
        Some(start)
    }

    /// Takes a range back; what touches it and is free becomes one with it.
    fn free(&mut self, start: Pointer) {
        let Some(mut bytes) = self.taken.remove(&start) else { return };
        let (mut first, end) = (start, start + bytes as u64);
        bytes += self.free.remove(&end).unwrap_or(0);
        let before = self.free.range(..start).next_back().filter(|&(&before, &room)| before + room as u64 == start);
        if let Some((&before, &room)) = before {
            (first, bytes) = (before, bytes + room);
        }
        self.free.insert(first, bytes);
    }
}

impl Arena {
    /// Adds a piece, all of it free. Start and bytes are multiples of [`ALIGNMENT`].
    pub fn add(&mut self, start: Pointer, bytes: usize) {
        let (free, taken) = (BTreeMap::from([(start, bytes)]), HashMap::new());
        self.0.push(Piece { start, bytes, free, taken });
    }

    /// A range of at least so many bytes in the first piece that has room for it.
    pub fn take(&mut self, bytes: usize) -> Option<Pointer> {
        let bytes = rounded(bytes)?;
        self.0.iter_mut().find_map(|piece| piece.take(bytes))
    }

    /// The same, in a further piece where those that there are have no room; `None` where there is no memory for it.
    ///
    /// # Errors
    /// When the device fails.
    pub fn allocate(&mut self, bytes: usize, pieces: &impl Pieces) -> Result<Option<Pointer>> {
        let Some(room) = rounded(bytes) else { return Ok(None) };
        let found = self.take(bytes);
        if found.is_none() && (self.grow(room.max(PIECE), 0, pieces)? || self.reserve(room, 0, pieces)?) {
            return Ok(self.take(bytes));
        }
        Ok(found)
    }

    /// Takes a range back.
    pub fn free(&mut self, start: Pointer) {
        if let Some(piece) = self.0.iter_mut().find(|piece| (piece.start..piece.end()).contains(&start)) {
            piece.free(start);
        }
    }

    /// Makes sure that so many bytes are free side by side, by a piece of that size if need be, which leaves `beside` bytes to
    /// others, and for which unused pieces go where there is no room otherwise. False where there is none even so.
    ///
    /// # Errors
    /// When the device fails.
    pub fn reserve(&mut self, bytes: usize, beside: usize, pieces: &impl Pieces) -> Result<bool> {
        let Some(bytes) = rounded(bytes) else { return Ok(false) };
        let mut free = self.0.iter().flat_map(|piece| piece.free.values());
        if free.any(|&room| room >= bytes) || self.grow(bytes, beside, pieces)? {
            return Ok(true);
        }
        self.give_back(pieces)?;
        self.grow(bytes, beside, pieces)
    }

    /// Gives the pieces back of which nothing is out.
    ///
    /// # Errors
    /// When the device fails.
    fn give_back(&mut self, pieces: &impl Pieces) -> Result<()> {
        let unused = self.0.extract_if(.., |piece| piece.taken.is_empty());
        unused.map(|piece| piece.start).collect::<Vec<_>>().into_iter().try_for_each(|start| pieces.take_back(start))
    }

    /// Where its pieces start.
    pub fn starts(&self) -> impl Iterator<Item = Pointer> {
        self.0.iter().map(|piece| piece.start)
    }

    /// Adds a piece of so many bytes, if there is one that leaves `beside`.
    fn grow(&mut self, bytes: usize, beside: usize, pieces: &impl Pieces) -> Result<bool> {
        let Some(start) = pieces.make(bytes)? else { return Ok(false) };
        if beside > 0 && pieces.free_bytes()? < beside {
            return pieces.take_back(start).map(|()| false);
        }
        self.add(start, bytes);
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use proptest::prelude::*;

    use super::*;

    /// A device of so many bytes, whose pieces touch each other, and how often it was asked for one.
    #[derive(Default)]
    struct Fake {
        room: usize,
        made: RefCell<BTreeMap<Pointer, usize>>,
        asked: RefCell<usize>,
    }

    impl Fake {
        fn of(room: usize) -> Self {
            Fake { room, ..Fake::default() }
        }
    }

    impl Pieces for Fake {
        fn make(&self, bytes: usize) -> Result<Option<Pointer>> {
            *self.asked.borrow_mut() += 1;
            let mut made = self.made.borrow_mut();
            if made.values().sum::<usize>().checked_add(bytes).is_none_or(|all| all > self.room) {
                return Ok(None);
            }
            let start = made.last_key_value().map_or(ALIGNMENT as u64, |(&start, &bytes)| start + bytes as u64);
            made.insert(start, bytes);
            Ok(Some(start))
        }

        fn take_back(&self, start: Pointer) -> Result<()> {
            assert!(self.made.borrow_mut().remove(&start).is_some(), "{start} is no piece");
            Ok(())
        }

        fn free_bytes(&self) -> Result<usize> {
            Ok(self.room - self.made.borrow().values().sum::<usize>())
        }
    }

    /// In each piece every byte is either free or out, once, and no two free ranges touch each other.
    fn check(arena: &Arena) {
        for piece in &arena.0 {
            let free = piece.free.iter().map(|(&start, &bytes)| (start, bytes, true));
            let mut ranges: Vec<_> =
                free.chain(piece.taken.iter().map(|(&start, &bytes)| (start, bytes, false))).collect();
            ranges.sort_unstable();
            let (mut next, mut free_before) = (piece.start, false);
            for (start, bytes, free) in ranges {
                assert_eq!(start, next, "a gap or an overlap");
                assert!(start.is_multiple_of(ALIGNMENT as u64) && bytes > 0);
                assert!(!(free && free_before), "two free ranges touch each other at {start}");
                (next, free_before) = (start + bytes as u64, free);
            }
            assert_eq!(next, piece.end());
        }
    }

    /// Bytes of the pieces.
    fn sizes(arena: &Arena) -> Vec<usize> {
        arena.0.iter().map(|piece| piece.bytes).collect()
    }

    /// Bytes to take, or which of those that are out to free.
    #[derive(Clone, Debug)]
    enum Step {
        Take(usize),
        Free(prop::sample::Index),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let bytes = prop_oneof![Just(0), 1..3000usize, 0..PIECE / 4, PIECE..PIECE * 3];
        let step = prop_oneof![
            3 => bytes.prop_map(Step::Take),
            2 => any::<prop::sample::Index>().prop_map(Step::Free),
        ];
        prop::collection::vec(step, 0..60)
    }

    /// Makes the steps; gives what was handed out, and leaves it all free if so asked. `take` may fail.
    fn go(
        arena: &mut Arena,
        steps: &[Step],
        mut take: impl FnMut(&mut Arena, usize) -> Option<Pointer>,
    ) -> Vec<Pointer> {
        let (mut all, mut out) = (Vec::new(), Vec::new());
        for step in steps {
            match step {
                Step::Take(bytes) => {
                    let taken = take(arena, *bytes);
                    out.extend(taken);
                    all.extend(taken);
                }
                Step::Free(_) if out.is_empty() => {}
                Step::Free(index) => arena.free(out.swap_remove(index.index(out.len()))),
            }
            check(arena);
        }
        out.into_iter().for_each(|start| arena.free(start));
        check(arena);
        all
    }

    proptest! {
        #[test]
        fn ranges_lie_apart_and_all_that_was_freed_is_whole_again(steps in steps(), room in PIECE..20 * PIECE) {
            let (mut arena, device) = (Arena::default(), Fake::of(room));
            go(&mut arena, &steps, |arena, bytes| arena.allocate(bytes, &device).unwrap());
            prop_assert!(arena.0.iter().all(|piece| piece.free == BTreeMap::from([(piece.start, piece.bytes)])));
            prop_assert_eq!(sizes(&arena).iter().sum::<usize>(), device.made.borrow().values().sum::<usize>());
            arena.give_back(&device).unwrap();
            prop_assert!(arena.0.is_empty() && device.made.borrow().is_empty());
        }

        #[test]
        fn what_comes_again_finds_room_where_it_was(steps in steps()) {
            let (mut arena, device) = (Arena::default(), Fake::of(usize::MAX));
            let mut take = |arena: &mut Arena, bytes| arena.allocate(bytes, &device).unwrap();
            let first = go(&mut arena, &steps, &mut take);
            let asked = *device.asked.borrow();
            let second = go(&mut arena, &steps, &mut take);
            prop_assert_eq!(first, second);
            prop_assert_eq!(*device.asked.borrow(), asked);
        }

        #[test]
        fn calls_get_the_same_ranges_of_a_piece_that_just_holds_them(steps in steps()) {
            let (mut endless, mut most) = (Arena::default(), 0);
            endless.add(ALIGNMENT as u64, 1 << 62);
            let expected = go(&mut endless, &steps, |arena, bytes| {
                let start = arena.take(bytes)?;
                most = most.max(start as usize + rounded(bytes)?);
                Some(start)
            });
            let (mut planned, device) = (Arena::default(), Fake::of(most));
            prop_assert!(most == 0 || planned.reserve(most - ALIGNMENT, 0, &device).unwrap());
            let taken = go(&mut planned, &steps, |arena, bytes| arena.take(bytes));
            prop_assert_eq!(taken, expected);
        }
    }

    #[test]
    fn sizes_that_no_device_has_are_not_there() {
        let (mut arena, device) = (Arena::default(), Fake::of(1 << 40));
        for bytes in [usize::MAX, usize::MAX - ALIGNMENT, usize::MAX / 2, 1 << 41] {
            assert_eq!(arena.allocate(bytes, &device).unwrap(), None, "{bytes}");
            assert!(!arena.reserve(bytes, 0, &device).unwrap(), "{bytes}");
        }
        assert!(arena.0.is_empty());
    }

    #[test]
    fn where_little_is_left_a_piece_is_as_large_as_what_is_asked_for_and_unused_ones_go_first() {
        let (mut arena, device) = (Arena::default(), Fake::of(PIECE + 1000 * ALIGNMENT));
        let [held, small] = [PIECE, 1].map(|bytes| arena.allocate(bytes, &device).unwrap().unwrap());
        assert_eq!(sizes(&arena), [PIECE, ALIGNMENT]);
        assert_eq!(arena.allocate(1000 * ALIGNMENT, &device).unwrap(), None);
        arena.free(small);
        assert!(arena.allocate(1000 * ALIGNMENT, &device).unwrap().is_some());
        assert_eq!(sizes(&arena), [PIECE, 1000 * ALIGNMENT]);
        arena.free(held);
        assert!(arena.reserve(PIECE + 1, 0, &device).is_ok_and(|reserved| !reserved));
        assert_eq!(sizes(&arena), [1000 * ALIGNMENT]);
    }

    #[test]
    fn what_is_reserved_leaves_room_to_others_and_takes_none_where_it_cannot() {
        let (mut arena, device) = (Arena::default(), Fake::of(10 * ALIGNMENT));
        let mut reserves = |count, beside| arena.reserve(count * ALIGNMENT, beside * ALIGNMENT, &device).unwrap();
        assert!(!reserves(8, 3));
        assert_eq!(device.free_bytes().unwrap(), 10 * ALIGNMENT);
        assert!(reserves(8, 2));
        // What is there already asks nothing of others.
        assert!(reserves(7, 3));
        assert_eq!(device.free_bytes().unwrap(), 2 * ALIGNMENT);
    }
}
