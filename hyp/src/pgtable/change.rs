//! Making the tables say something else.
//!
//! The order of stores, barriers and invalidations (Arm ARM, D8.17, "Using break-before-make when updating translation
//! table entries"; docs/memory-ownership.md, TLB and cache rules) stands in [`Table::change`] and the functions below it,
//! and nowhere else.

use super::walk::LastTable;
use super::{ENTRIES, Level, Regime, Run, TABLE_OR_PAGE, Table, VALID, output, target};
use crate::addr::{Frame, Pages, Pfn, PhysAddr};
use crate::machine::Machine;
use crate::pool::PagePool;

impl<R: Regime> Table<R> {
    /// Says `first` of the first page of a region and what follows from it of the others.
    ///
    /// The region lies within [`REGION_PAGES`](super::REGION_PAGES) of one last-level table, or is exactly one block.
    /// The pool holds at least [`tables_needed`](Self::tables_needed) pages: the caller has checked, under the lock
    /// that it still holds. Where access is taken away it is gone from every TLB when this returns.
    pub fn set<M: Machine>(
        &mut self,
        machine: &M,
        region: Pages<R::Input>,
        pool: &mut PagePool,
        first: R::Entry,
    ) {
        let mut rest = Some(region);
        let mut word = self.regime.encode(first);
        while let Some(pages) = rest {
            let Some(run) = self.run(machine, pages) else {
                crate::broken("a table was set beyond its input space");
            };
            let count = run.pages.count();
            self.change_to(machine, run, pool, word);
            rest = pages.advanced(count);
            word = word.wrapping_add(R::step(word).wrapping_mul(count));
        }
    }

    /// The same for a run, which is used up. The pool holds what it needs ([`Run::tables_needed`]).
    #[inline(always)]
    pub fn change<M: Machine>(&mut self, machine: &M, run: Run<R>, pool: &mut PagePool, first: R::Entry) {
        self.change_to(machine, run, pool, self.regime.encode(first));
    }

    /// The same for the page word of the first page.
    #[inline(always)]
    fn change_to<M: Machine>(&mut self, machine: &M, run: Run<R>, pool: &mut PagePool, word: u64) {
        if machine.read_descriptor(run.at) != run.leaf {
            crate::broken("a run was used after its table changed");
        }
        #[cfg(any(test, feature = "sim"))]
        self.check_unchanged(machine, &run);
        if run.level == Level::THREE && run.pages.count() == 1 && changes_in_place::<R>(run.leaf, word) {
            machine.write_descriptor(run.at, word);
            machine.publish();
        } else {
            self.change_any(machine, run, pool, word);
        }
    }

    /// Tests look at all pages of a run once more: whoever let go of the lock meanwhile has no right to it.
    #[cfg(any(test, feature = "sim"))]
    fn check_unchanged<M: Machine>(&self, machine: &M, run: &Run<R>) {
        let now = self.run(machine, run.pages);
        let is_same = now.is_some_and(|now| (now.pages, now.word) == (run.pages, run.word));
        assert!(is_same, "a run was used after its table changed: {:?}", run.pages);
    }

    /// The same, whatever has to be done for it.
    #[inline(never)]
    fn change_any<M: Machine>(&mut self, machine: &M, run: Run<R>, pool: &mut PagePool, word: u64) {
        let run = if run.tables_needed() == 0 { run } else { self.split(machine, &run, pool) };
        let count = if run.level == Level::THREE { run.pages.count() } else { 1 };
        let new = Words { at: run.at, count, first: run.level.leaf(word), step: R::step(word) };
        // What holds of the first holds of all: old words and new ones have one step if they say the same but for
        // software bits.
        if changes_in_place::<R>(run.leaf, new.first) {
            new.write(machine);
            machine.publish();
        } else {
            self.replace(machine, run.pages, &new);
        }
    }

    /// Writes leaves in the place of valid ones whose address or rights they change: break, and make only then.
    fn replace<M: Machine>(&self, machine: &M, pages: Pages<R::Input>, new: &Words) {
        let make_later = new.first & VALID != 0;
        if make_later && !R::BREAKS {
            crate::broken("a translation was changed that others cannot do without");
        }
        if make_later {
            Words { first: R::LOCKED, step: 0, ..*new }.write(machine);
        } else {
            new.write(machine);
        }
        machine.publish();
        self.regime.invalidate(machine, self.root, pages);
        if make_later {
            new.write(machine);
            machine.publish();
        }
    }

    /// Splits the leaf that speaks for a run, and for more, until one speaks for the run alone, or its pages have words
    /// of their own.
    fn split<M: Machine>(&mut self, machine: &M, run: &Run<R>, pool: &mut PagePool) -> Run<R> {
        let (mut at, mut leaf, mut level) = (run.at, run.leaf, run.level);
        let start = run.pages.start().as_u64();
        while level.tables_down_to(target::<R>(run.pages)) > 0 {
            let table = self.split_once(machine, at, leaf, level, start, pool);
            level = level.next();
            at = table.word(level.entry_of(start));
            leaf = machine.read_descriptor(at);
        }
        Run { pages: run.pages, word: run.word, at, leaf, level }
    }

    /// Puts 512 leaves that say the same in the place of one, which speaks for page `frame`: the only way that a
    /// block becomes a table. Returns the table.
    fn split_once<M: Machine>(
        &self,
        machine: &M,
        at: PhysAddr,
        leaf: u64,
        level: Level,
        frame: u64,
        pool: &mut PagePool,
    ) -> Pfn {
        let Some(table) = pool.pop(machine) else {
            crate::broken("a reserved table is missing");
        };
        let (first, below) = (level.page_word(leaf), level.next());
        let step = R::step(first).wrapping_mul(below.pages());
        Words { at: table.base(), count: ENTRIES, first: below.leaf(first), step }.write(machine);
        machine.publish();
        let block = Pages::from_raw(level.first_of(frame), level.pages());
        if let Some(block) = block.filter(|_| R::BREAKS && leaf & VALID != 0) {
            self.break_entry(machine, at, block);
        }
        machine.write_descriptor(at, table.base().as_u64() | VALID | TABLE_OR_PAGE);
        machine.publish();
        table
    }

    /// Break: makes a valid entry invalid and waits until no CPU uses it. The make is the caller's.
    fn break_entry<M: Machine>(&self, machine: &M, at: PhysAddr, pages: Pages<R::Input>) {
        machine.write_descriptor(at, R::LOCKED);
        machine.publish();
        self.regime.invalidate(machine, self.root, pages);
    }

    /// Says of the whole space that nothing is known of it: for a new root.
    pub fn clear<M: Machine>(&self, machine: &M) {
        let words = self.root_pages().saturating_mul(ENTRIES);
        Words { at: self.root.base(), count: words, first: self.regime.encode(R::EMPTY), step: 0 }
            .write(machine);
        machine.publish();
    }

    /// Says what follows from `first` of every whole entry of the root that lies in these pages, and of nothing
    /// else: for a new root, which no walker has seen and below which there is no table yet.
    pub fn fill_root<M: Machine>(&self, machine: &M, pages: Pages<R::Input>, first: R::Entry) {
        let size = self.start.pages();
        let end = pages.end().min(self.input_end());
        let entries = pages.start().as_u64().div_ceil(size)..self.start.entry_of(end);
        let first = self.regime.encode(first);
        for index in entries {
            let offset = index.saturating_mul(size).saturating_sub(pages.start().as_u64());
            let word = first.wrapping_add(R::step(first).wrapping_mul(offset));
            if let Some(table) = self.root.checked_add(index / ENTRIES) {
                machine.write_descriptor(table.word(index), self.start.leaf(word));
            }
        }
        machine.publish();
    }

    /// A table that has no table below it; `None` when only the root is left.
    pub fn lowest_table<M: Machine>(&self, machine: &M) -> Option<Pfn> {
        self.lowest_link(machine).map(|(_, table)| table)
    }

    /// Unlinks that table and returns its page, wiped by nobody. For trees whose VM is dying, after
    /// [`Machine::retire_stage2`]: no walker looks at the tree any more, and no leaf of the table is valid.
    pub fn unlink_table<M: Machine>(&mut self, machine: &M) -> Option<Pfn> {
        let (at, table) = self.lowest_link(machine)?;
        self.last.set(LastTable::NONE);
        machine.write_descriptor(at, self.regime.encode(R::EMPTY));
        machine.publish();
        Some(table)
    }

    /// Where the lowest table is linked, and its page.
    fn lowest_link<M: Machine>(&self, machine: &M) -> Option<(PhysAddr, Pfn)> {
        let mut parent = None;
        let mut table = self.root;
        let mut words = self.root_pages().saturating_mul(ENTRIES);
        let mut level = self.start;
        loop {
            let child = (0..words).find_map(|index| {
                let at = table.base().checked_add(index.saturating_mul(8))?;
                let word = machine.read_descriptor(at);
                level.is_table(word).then_some((at, output(word)))
            });
            let Some((_, next)) = child else { return parent };
            (parent, table, words, level) = (child, next, ENTRIES, level.next());
        }
    }
}

/// Whether a leaf can become another in one store: nobody may be using it, or all that hardware sees stays.
#[inline(always)]
fn changes_in_place<R: Regime>(old: u64, new: u64) -> bool {
    old & VALID == 0 || (old ^ new) & !R::SOFTWARE == 0
}

/// Consecutive words of a table, each the one before and a step.
struct Words {
    at: PhysAddr,
    count: u64,
    first: u64,
    step: u64,
}

impl Words {
    #[inline]
    fn write<M: Machine>(&self, machine: &M) {
        let mut word = self.first;
        for at in self.at.words(self.count) {
            machine.write_descriptor(at, word);
            word = word.wrapping_add(self.step);
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::addr::{Gfn, Pages, Pfn, Vpn};
    use crate::pgtable::hyp_stage1::Mapped;
    use crate::pgtable::stage2::{Entry, Page, Sharing};
    use crate::testing::{HYP_START, RAM_START, World};
    use abi::VmFlags;
    use abi::host::HostCall;
    use abi::page::Permissions;

    const GFN: u64 = 0x8_0000;

    #[test]
    #[should_panic(expected = "a run was used after its table changed")]
    fn a_run_is_good_until_any_of_its_pages_changes() {
        let world = World::new();
        let vm = world.protected_vm();
        world.ok(HostCall::DonateGuest { vm, pfn: RAM_START + 4, gfn: GFN, pages: 2 });
        let gfns = Pages::<Gfn>::from_raw(GFN, 2).unwrap();
        world.hyp.with_vm(vm, |vm| {
            let (machine, space) = (world.hyp.machine(), &mut vm.space);
            let run = space.table.run(machine, gfns).unwrap();
            assert_eq!(run.pages(), gfns);
            let second = gfns.advanced(1).unwrap();
            space.table.set(machine, second, &mut space.cache, Entry::Poisoned);
            space.table.change(machine, run, &mut space.cache, Entry::Empty);
        });
    }

    #[test]
    #[should_panic(expected = "a translation was changed that others cannot do without")]
    fn el2s_own_translation_of_a_page_does_not_become_another() {
        let world = World::new();
        let page = Pages::<Vpn>::from_raw(HYP_START, 1).unwrap();
        let (mut host, mut hyp) = (world.hyp.host.lock(), world.hyp.hyp.lock());
        let mapped = hyp.table.entry(world.hyp.machine(), page.start()).flatten().unwrap();
        let other = Some(Mapped { pfn: Pfn::new(HYP_START + 1).unwrap(), ..mapped });
        hyp.table.set(world.hyp.machine(), page, &mut host.pool, other);
    }

    #[test]
    fn no_bit_that_hardware_uses_changes_in_place() {
        let world = World::new();
        let vm = world.protected_vm();
        world.ok(HostCall::DonateGuest { vm, pfn: RAM_START + 4, gfn: GFN, pages: 2 });
        let gfns = Pages::<Gfn>::from_raw(GFN, 1).unwrap();
        let all = Permissions::ALL;
        let (constant, data) = (Permissions { write: false, ..all }, Permissions { execute: false, ..all });
        // Less, other and more rights; another page.
        for (page, permissions) in [(4, constant), (4, data), (4, all), (5, all), (4, constant)] {
            world.load(world.guest(vm));
            let pfn = Pfn::new(RAM_START + page).unwrap();
            let entry = Entry::Page(Page { pfn, sharing: Sharing::Owned, permissions });
            world.hyp.with_vm(vm, |vm| {
                let space = &mut vm.space;
                space.table.set(world.hyp.machine(), gfns, &mut space.cache, entry);
            });
            world.check();
            assert_eq!(world.guest_reads(vm, GFN), Some(page));
            let write = world.sim().access_stage2(0, world.guest(vm), GFN << 12, sim::Access::Write);
            assert_eq!(write.is_ok(), permissions.write, "{permissions:?}");
        }
    }

    #[test]
    fn the_host_is_never_without_a_page_that_it_lends() {
        let world = World::new();
        let [one, other] = [0x1000, 0x1100].map(|root| world.vm(VmFlags::default(), root, 8));
        let lend = |vm, pages| {
            let call =
                HostCall::ShareGuest { vm, pfn: RAM_START + 4, gfn: 3, pages, permissions: Permissions::ALL };
            assert_eq!(world.ok(call), pages);
        };
        // Splits the block that the page is in.
        lend(one, 2);
        world.sim().clear();
        lend(other, 1);
        world.ok(HostCall::UnshareGuest { vm: one, gfn: 4, pages: 1 });
        let host = world.host().vmid;
        let is_hosts =
            |event: &sim::Event| matches!(event, sim::Event::TlbiStage2Ipa { vmid, .. } if *vmid == host);
        assert!(!world.sim().events().iter().any(is_hosts), "no entry of the host's is broken");
        world.check();
    }
}
