//! Memory as the hypervisor itself uses it: physical loads and stores, cache maintenance, and host memory
//! that changes under its hands.

use std::collections::BTreeMap;

use crate::log::{Event, Violation};
use crate::pending::Range;
use crate::ram::{PAGE, page_of};
use crate::{Sim, State};

/// Values that addresses take on just before a later load: (loads to go, value).
#[derive(Debug, Default)]
pub(crate) struct LoadHooks(BTreeMap<u64, Vec<(usize, u64)>>);

impl LoadHooks {
    /// Counts a load of `pa`; returns the value that the word takes on now, if any.
    fn count(&mut self, pa: u64) -> Option<u64> {
        let waiting = self.0.get_mut(&pa)?;
        let mut due = None;
        waiting.retain_mut(|(left, value)| {
            *left -= 1;
            if *left == 0 {
                due = Some(*value);
            }
            *left != 0
        });
        if waiting.is_empty() {
            self.0.remove(&pa);
        }
        due
    }
}

impl State {
    /// Stores a word that is not a descriptor.
    pub(crate) fn store(&mut self, pa: u64, value: u64) {
        self.tables.raw_word(pa, &mut self.log.violations);
        self.ram.poke(pa, value);
    }
}

#[track_caller]
fn check_word(pa: u64, what: &str) {
    assert!(pa.is_multiple_of(8), "sim: {what} at {pa:#x}, which is not 8-byte aligned");
}

#[track_caller]
fn check_page(state: &State, pa: u64, what: &str) {
    assert!(pa.is_multiple_of(PAGE), "sim: {what} at {pa:#x}, which is not page-aligned");
    state.ram.check(pa, what);
}

impl Sim {
    /// Loads the word at `pa`.
    ///
    /// # Panics
    /// When `pa` is not 8-byte aligned or not in RAM.
    #[track_caller]
    #[must_use]
    pub fn load64(&self, pa: u64) -> u64 {
        let mut state = self.lock();
        check_word(pa, "load64");
        state.ram.check(pa, "load64");
        if let Some(value) = state.hooks.count(pa) {
            state.store(pa, value);
        }
        state.ram.peek(pa).unwrap_or(0)
    }

    /// Stores a word that is not a page-table descriptor (for those, see [`Sim::write_desc`]).
    ///
    /// # Panics
    /// When `pa` is not 8-byte aligned or not in RAM.
    #[track_caller]
    pub fn store64(&self, pa: u64, value: u64) {
        let mut state = self.lock();
        check_word(pa, "store64");
        state.ram.check(pa, "store64");
        state.store(pa, value);
    }

    /// Makes the word at `pa` become `value` just before the `n`-th load of it by [`Sim::load64`] from now
    /// (1 is the next one), as if the host had stored it then.
    ///
    /// # Panics
    /// When `n` is 0, or `pa` is not 8-byte aligned or not in RAM.
    #[track_caller]
    pub fn on_nth_load(&self, pa: u64, n: usize, value: u64) {
        let mut state = self.lock();
        check_word(pa, "on_nth_load");
        state.ram.check(pa, "on_nth_load");
        assert!(n > 0, "sim: on_nth_load counts from 1");
        state.hooks.0.entry(pa).or_default().push((n, value));
    }

    /// Reads `len` bytes from `pa`, for tests: does not count as a load.
    ///
    /// # Panics
    /// When a byte is not in RAM.
    #[track_caller]
    #[must_use]
    pub fn read_bytes(&self, pa: u64, len: usize) -> Vec<u8> {
        let state = self.lock();
        (pa..)
            .take(len)
            .map(|at| {
                state.ram.check(at, "read_bytes");
                let word = state.ram.peek(at & !7).unwrap_or(0);
                word.to_le_bytes()[usize::from(at as u8 & 7)]
            })
            .collect()
    }

    /// Writes bytes from `pa`, for tests.
    ///
    /// # Panics
    /// When a byte is not in RAM.
    #[track_caller]
    pub fn write_bytes(&self, pa: u64, bytes: &[u8]) {
        let mut state = self.lock();
        let (mut at, mut left) = (pa, bytes);
        while !left.is_empty() {
            state.ram.check(at, "write_bytes");
            let first = (at & 7) as usize;
            let (now, later) = left.split_at(left.len().min(8 - first));
            let mut word = state.ram.peek(at & !7).unwrap_or(0).to_le_bytes();
            word[first..first + now.len()].copy_from_slice(now);
            state.store(at & !7, u64::from_le_bytes(word));
            (at, left) = (at + now.len() as u64, later);
        }
    }

    /// Fills a page with a word, in the caches and behind them, as whoever has it may: this is no maintenance by the
    /// hypervisor.
    ///
    /// # Panics
    /// When `pa` is not page-aligned or not in RAM.
    #[track_caller]
    pub fn fill_page(&self, pa: u64, word: u64) {
        let mut guard = self.lock();
        let state = &mut *guard;
        check_page(state, pa, "fill_page");
        (pa..pa + PAGE).step_by(8).for_each(|at| state.tables.raw_word(at, &mut state.log.violations));
        state.ram.fill(pa, word);
    }

    /// Zeroes a page, in the caches only: what was in it may still be at the point of coherency. The page
    /// is then fit to be a table.
    ///
    /// # Panics
    /// When `pa` is not page-aligned or not in RAM.
    #[track_caller]
    pub fn zero_page(&self, pa: u64) {
        let mut guard = self.lock();
        let state = &mut *guard;
        check_page(state, pa, "zero_page");
        state.tables.zeroed(pa, &mut state.log.violations);
        state.ram.zero(pa);
        state.log.event(Event::ZeroPage { pa });
    }

    /// Cleans a page to the point of coherency.
    ///
    /// # Panics
    /// When `pa` is not page-aligned or not in RAM.
    #[track_caller]
    pub fn clean_page(&self, pa: u64) {
        let mut guard = self.lock();
        let state = &mut *guard;
        check_page(state, pa, "clean_page");
        state.tables.cleaned(pa);
        state.ram.clean(pa);
        state.log.event(Event::CleanPage { pa });
    }

    /// Zeroes a page and cleans it to the point of coherency.
    ///
    /// # Panics
    /// When `pa` is not page-aligned or not in RAM.
    #[track_caller]
    pub fn wipe_page(&self, pa: u64) {
        let mut guard = self.lock();
        let state = &mut *guard;
        check_page(state, pa, "wipe_page");
        if let Some((page, held_by)) = state.tables.revoked(&Range::new(pa, PAGE), None) {
            state.log.violations.push(Violation::WipedBeforeTaken { page, held_by });
        }
        state.tables.zeroed(pa, &mut state.log.violations);
        state.tables.wiped(pa);
        state.ram.wipe(pa);
        state.log.event(Event::WipePage { pa });
    }

    /// Invalidates the instruction caches of all CPUs (IC IALLUIS).
    pub fn invalidate_icache(&self) {
        let mut state = self.lock();
        state.icache_invalidations += 1;
        state.log.event(Event::InvalidateIcache);
    }

    /// Returns how often the page that `pa` is in was wiped.
    #[must_use]
    pub fn wipes(&self, pa: u64) -> usize {
        self.lock().ram.maintenance(page_of(pa)).0
    }

    /// Returns how often the page that `pa` is in was cleaned; a wipe counts as a wipe only.
    #[must_use]
    pub fn cleans(&self, pa: u64) -> usize {
        self.lock().ram.maintenance(page_of(pa)).1
    }

    /// Returns how often the instruction caches were invalidated.
    #[must_use]
    pub fn icache_invalidations(&self) -> usize {
        self.lock().icache_invalidations
    }

    /// Tells whether the page that `pa` is in was written since it was last cleaned or wiped.
    #[must_use]
    pub fn is_dirty(&self, pa: u64) -> bool {
        self.lock().ram.is_dirty(pa)
    }

    /// Returns the word at `pa` as it is at the point of coherency: what the host or a guest reads with its
    /// caches off. Nothing that was private to a guest may ever show up here once the host can reach it.
    ///
    /// # Panics
    /// When `pa` is not 8-byte aligned or not in RAM.
    #[track_caller]
    #[must_use]
    pub fn load64_uncached(&self, pa: u64) -> u64 {
        let state = self.lock();
        check_word(pa, "load64_uncached");
        state.ram.check(pa, "load64_uncached");
        state.ram.peek_poc(pa).unwrap_or(0)
    }

    /// Tells whether a page reads as zeros, through the caches and past them.
    ///
    /// # Panics
    /// When `pa` is not in RAM.
    #[track_caller]
    #[must_use]
    pub fn is_zero_page(&self, pa: u64) -> bool {
        let state = self.lock();
        state.ram.check(pa, "is_zero_page");
        state.ram.is_zero(pa)
    }

    /// Returns a number that grows with every write to RAM and every maintenance of a page: while it stays the
    /// same, neither tables nor contents have changed.
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.lock().ram.changes()
    }

    /// Returns the number of pages that take memory on the build machine: those ever written or maintained.
    #[must_use]
    pub fn resident_pages(&self) -> usize {
        self.lock().ram.resident()
    }

    /// Tells whether the page that `pa` is in is RAM.
    #[must_use]
    pub fn is_ram(&self, pa: u64) -> bool {
        self.lock().ram.contains(pa)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{RAM, machine};

    #[test]
    fn words_and_bytes_are_little_endian() {
        let sim = machine();
        assert_eq!((sim.load64(RAM), sim.resident_pages()), (0, 0));
        sim.store64(RAM, 0x0807_0605_0403_0201);
        assert_eq!(sim.read_bytes(RAM + 1, 3), [2, 3, 4]);
        sim.write_bytes(RAM + 0xffe, &[0xaa, 0xbb, 0xcc]);
        assert_eq!(sim.load64(RAM + 0xff8), 0xbbaa_0000_0000_0000);
        assert_eq!(sim.load64(RAM + 0x1000), 0xcc);
        assert!(sim.is_ram(RAM) && !sim.is_ram(RAM - 1));
    }

    #[test]
    #[should_panic(expected = "store64 at 0x1000, which is outside RAM")]
    fn store_outside_ram_is_a_bug_of_the_caller() {
        machine().store64(0x1000, 0);
    }

    #[test]
    #[should_panic(expected = "load64 at 0x80000000, which is outside RAM")]
    fn load_just_past_ram_is_a_bug_of_the_caller() {
        let _ = machine().load64(RAM + (1 << 30));
    }

    #[test]
    #[should_panic(expected = "wipe_page at 0x40000008, which is not page-aligned")]
    fn page_operation_inside_a_page_is_a_bug_of_the_caller() {
        machine().wipe_page(RAM + 8);
    }

    #[test]
    fn maintenance_is_counted_for_each_page() {
        let sim = machine();
        sim.store64(RAM, 1);
        assert!(sim.is_dirty(RAM + 8));
        sim.clean_page(RAM);
        sim.wipe_page(RAM);
        sim.wipe_page(RAM);
        sim.invalidate_icache();
        assert_eq!((sim.wipes(RAM + 5), sim.cleans(RAM + 5)), (2, 1));
        sim.fill_page(RAM + PAGE, 7);
        assert_eq!((sim.load64(RAM + PAGE + 8), sim.load64_uncached(RAM + PAGE + 16)), (7, 7));
        assert_eq!((sim.wipes(RAM + PAGE), sim.cleans(RAM + PAGE)), (0, 0));
        assert_eq!(sim.icache_invalidations(), 1);
        assert!(!sim.is_dirty(RAM));
        assert_eq!(
            sim.events(),
            [
                Event::CleanPage { pa: RAM },
                Event::WipePage { pa: RAM },
                Event::WipePage { pa: RAM },
                Event::InvalidateIcache
            ]
        );
    }

    #[test]
    fn secret_that_was_only_zeroed_is_seen_past_the_caches() {
        let sim = machine();
        sim.store64(RAM, 0x5ec2e7);
        sim.zero_page(RAM);
        assert_eq!(sim.load64(RAM), 0);
        assert_eq!(sim.load64_uncached(RAM), 0x5ec2e7);
        sim.wipe_page(RAM);
        assert_eq!(sim.load64_uncached(RAM), 0);
    }

    #[test]
    fn host_memory_changes_before_the_nth_load() {
        let sim = machine();
        sim.store64(RAM, 1);
        sim.on_nth_load(RAM, 2, 22);
        sim.on_nth_load(RAM, 3, 33);
        let _ = sim.load64(RAM + 8);
        assert_eq!(sim.load64(RAM), 1);
        let _ = sim.read_bytes(RAM, 8);
        assert_eq!(sim.load64(RAM), 22);
        assert_eq!(sim.load64(RAM), 33);
        assert_eq!(sim.load64(RAM), 33);
    }

    #[test]
    fn machine_can_be_looked_at_after_a_panic() {
        let sim = machine();
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| sim.store64(0, 0)));
        assert!(caught.is_err());
        assert_eq!(sim.load64(RAM), 0);
    }
}
