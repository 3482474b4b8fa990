//! The discipline of page tables. Every descriptor write is followed: an entry is valid, broken (invalid,
//! but its old translation may still be in TLBs) or invalid; a table page is ordinary memory, live (linked
//! into a tree), detached (unlinked, but TLBs may still point to it) or freed.
//!
//! A table that TLBs have forgotten is ordinary memory again, and its old words do not count as
//! initialised: it may not be linked anew before all of them are written.
//!
//! A breach is recorded and the write goes ahead, so that one mistake is reported once.

use std::collections::BTreeMap;

use crate::format::{Desc, Format, Limits, decode, is_malformed, is_valid, significant, span};
use crate::log::Violation;
use crate::maintained::Maintained;
use crate::pending::{Pending, Range};
use crate::ram::{PAGE, PageMap, Ram, WORDS, page_of, word_of};
use crate::tlb::Scope;
use crate::walk::{El2Stage1, Found, Leaf, Regime, Space, Stage2, lookup};

/// What a root table translates for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableKind {
    /// Stage 2 of a VM, or of the host.
    Stage2 {
        /// The VMID under which its translations are cached.
        vmid: u16,
        /// Size of the input address, as in [`Stage2`].
        ipa_bits: u32,
    },
    /// EL2's own stage 1.
    El2 {
        /// Size of the input address, as in [`El2Stage1`].
        va_bits: u32,
    },
}

impl TableKind {
    pub(crate) fn space(self, root: u64) -> Space {
        match self {
            Self::Stage2 { vmid, ipa_bits } => Stage2 { vmid, root, ipa_bits }.into(),
            Self::El2 { va_bits } => El2Stage1 { root, va_bits }.into(),
        }
    }
}

/// Where a live table stands in its tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    root: u64,
    regime: Regime,
    format: Format,
    level: u8,
    /// First input address that the table translates.
    ia: u64,
}

impl Place {
    /// Returns the first input address of a descriptor of the table.
    fn ia_of(&self, index: usize) -> u64 {
        self.ia + index as u64 * span(self.level)
    }

    /// Returns the place of the table that a descriptor links.
    fn below(&self, index: usize) -> Self {
        Self { level: self.level + 1, ia: self.ia_of(index), ..*self }
    }
}

/// What a page is, as far as tables go; a page without a role is ordinary memory.
#[derive(Debug)]
enum Role {
    Live(Place),
    Detached(Place, Pending),
    Freed,
}

/// A descriptor that was made invalid and whose old translation has not been invalidated yet.
#[derive(Debug)]
struct Broken {
    old: u64,
    pending: Pending,
}

/// One bit for each descriptor of a page.
type Mask = [u64; WORDS / 64];

/// The history of all tables.
#[derive(Debug, Default)]
pub(crate) struct Tables {
    roles: PageMap<Role>,
    /// Which words of a page were initialised as descriptors, by zeroing or by descriptor writes.
    initialised: PageMap<Mask>,
    /// By address of the descriptor.
    broken: BTreeMap<u64, Broken>,
    /// The detached tables, all of which have something pending.
    detached: Vec<u64>,
    /// Live descriptors written since the last barrier.
    unordered: Vec<u64>,
    /// Pages that are no live tables and that descriptors were written to since the last barrier.
    unpublished: Vec<u64>,
    /// Input addresses whose translation may have changed since [`Tables::take_changed`].
    changed: Vec<(Regime, Range)>,
    maintained: Maintained,
}

impl Tables {
    /// Follows the write of a descriptor, and makes it.
    pub(crate) fn write(&mut self, ram: &mut Ram, pa: u64, new: u64, out: &mut Vec<Violation>) {
        let page = page_of(pa);
        match self.roles.get(&page) {
            Some(&Role::Live(place)) => {
                self.unordered.push(pa);
                self.changed(place.regime, Range::new(place.ia_of(word_of(pa)), span(place.level)));
                self.write_live(ram, pa, place, new, out);
                return;
            }
            Some(Role::Detached(place, _)) if is_valid(place.level, new) => {
                out.push(Violation::WriteBeforeTlbi { pa });
            }
            Some(Role::Freed) => out.push(Violation::WriteAfterFree { pa }),
            Some(Role::Detached(..)) | None => {}
        }
        let mask = self.initialised.entry(page).or_default();
        mask[word_of(pa) / 64] |= 1 << (word_of(pa) % 64);
        if self.unpublished.last() != Some(&page) {
            self.unpublished.push(page);
        }
        ram.poke(pa, new);
    }

    fn write_live(&mut self, ram: &mut Ram, pa: u64, place: Place, new: u64, out: &mut Vec<Violation>) {
        let Place { format, level, .. } = place;
        let old = ram.peek(pa).unwrap_or(0);
        let same = significant(format, level, old) == significant(format, level, new);
        ram.poke(pa, new);
        if same && is_valid(level, old) {
            return;
        }
        if is_valid(level, old) {
            if is_valid(level, new) {
                out.push(Violation::ValidToValid { pa, old, new });
            }
            let pending = self.pending_of(ram, &place, word_of(pa), old);
            let early = |pages: &Range| self.maintained.too_early(place.regime, *pages);
            if let Some(page) = pending.outputs().iter().find_map(early) {
                out.push(Violation::MaintainedBeforeTaken { page, held_by: place.regime });
            }
            self.broken.insert(pa, Broken { old, pending });
            if let Desc::Table { next, .. } = decode(format, level, old) {
                self.detach(ram, next, place.root, true);
            }
        }
        if is_valid(level, new)
            && let Some(broken) = self.broken.remove(&pa)
            && !is_valid(level, old)
            && significant(format, level, broken.old) != significant(format, level, new)
        {
            out.push(Violation::MadeBeforeTlbi { pa, old: broken.old, new });
        }
        self.check_made(ram, pa, &place, new, out);
    }

    /// Checks a word that has become a descriptor of a live table, and all that it links.
    fn check_made(&mut self, ram: &Ram, pa: u64, place: &Place, word: u64, out: &mut Vec<Violation>) {
        if is_malformed(place.format, place.level, word) {
            out.push(Violation::Malformed { pa, word });
        }
        match decode(place.format, place.level, word) {
            Desc::Invalid => {}
            Desc::Leaf(leaf) => {
                let range = Range::new(leaf.pa, span(place.level));
                self.maintained.given(place.regime, range);
                if let Some((output, held_by)) = self.revoked(&range, Some(place.regime)) {
                    out.push(Violation::GivenBeforeTaken { pa, output, held_by });
                }
                if place.format == Format::Stage2
                    && let Some(table) = self.table_in(&range)
                {
                    out.push(Violation::TableExposed { pa, table });
                }
            }
            Desc::Table { next, .. } => self.adopt(ram, next, place.below(word_of(pa)), out),
        }
    }

    /// Makes a table live, with everything below it.
    fn adopt(&mut self, ram: &Ram, table: u64, place: Place, out: &mut Vec<Violation>) {
        if !ram.contains(table) {
            out.push(Violation::MisplacedTable { table });
            return;
        }
        if matches!(self.roles.get(&table), Some(Role::Live(_))) {
            out.push(Violation::LinkedTwice { table });
            return;
        }
        if self.initialised.get(&table) != Some(&[u64::MAX; WORDS / 64]) {
            out.push(Violation::UninitialisedTable { table });
        }
        if self.unpublished.contains(&table) {
            out.push(Violation::UnpublishedTable { table });
        }
        if let Some(Role::Detached(before, _)) = self.roles.get(&table)
            && *before != place
        {
            out.push(Violation::LinkedBeforeTlbi { table });
        }
        self.detached.retain(|&page| page != table);
        self.roles.insert(table, Role::Live(place));
        for (index, word) in words(ram, table) {
            self.check_made(ram, table + index as u64 * 8, &place, word, out);
        }
    }

    /// Notes that addresses may translate differently from now on.
    pub(crate) fn changed(&mut self, regime: Regime, range: Range) {
        match self.changed.last_mut() {
            Some((last, at)) if *last == regime && at.start <= range.start && range.start <= at.end => {
                at.end = at.end.max(range.end);
            }
            _ => self.changed.push((regime, range)),
        }
    }

    /// Returns what may translate differently since the last call.
    pub(crate) fn take_changed(&mut self) -> Vec<(Regime, Range)> {
        std::mem::take(&mut self.changed)
    }

    /// Returns whose translation a live table is part of.
    pub(crate) fn regime(&self, table: u64) -> Option<Regime> {
        match self.roles.get(&table) {
            Some(Role::Live(place)) => Some(place.regime),
            _ => None,
        }
    }

    /// Returns the leaf that a word is as a descriptor of a live table, if it is one.
    pub(crate) fn leaf(&self, pa: u64, word: u64) -> Option<Leaf> {
        let Some(Role::Live(place)) = self.roles.get(&page_of(pa)) else { return None };
        let ia = place.ia_of(word_of(pa));
        match lookup(place.format, Limits::default(), place.level, ia, word) {
            Ok(Found::Leaf(leaf)) => Some(leaf),
            _ => None,
        }
    }

    /// Makes a table root of a translation.
    pub(crate) fn set_root(&mut self, ram: &Ram, space: &Space, out: &mut Vec<Violation>) {
        let root = space.root;
        if !root.is_multiple_of(space.root_tables() * PAGE) {
            out.push(Violation::MisplacedTable { table: root });
        }
        for number in 0..space.root_tables() {
            let table = root + number * PAGE;
            let place = Place {
                root,
                regime: space.regime,
                format: space.format,
                level: space.start,
                ia: number * span(space.start) * WORDS as u64,
            };
            self.adopt(ram, table, place, out);
        }
    }

    /// Detaches a whole tree: its root is loaded on no CPU any more.
    pub(crate) fn retire_root(&mut self, ram: &Ram, root: u64) {
        let mut number = 0;
        while matches!(self.roles.get(&(root + number * PAGE)), Some(Role::Live(place)) if place.root == root)
        {
            self.detach(ram, root + number * PAGE, root, false);
            number += 1;
        }
    }

    /// Makes a live table of the tree of `root` detached, with everything below it. A table that was linked
    /// by a descriptor may be in walk caches, unlike a root.
    fn detach(&mut self, ram: &Ram, table: u64, root: u64, linked: bool) {
        let place = match self.roles.get(&table) {
            Some(&Role::Live(place)) if place.root == root => place,
            _ => return,
        };
        let mut pending = Pending::new(place.regime);
        if linked {
            pending.add_pointer(place.ia, span(place.level) * WORDS as u64);
        }
        self.add_table(ram, &place, table, &mut pending);
        if pending.is_empty() {
            self.roles.remove(&table);
            self.initialised.remove(&table);
        } else {
            self.roles.insert(table, Role::Detached(place, pending));
            self.detached.push(table);
        }
        for (_, word) in words(ram, table) {
            if let Desc::Table { next, .. } = decode(place.format, place.level, word) {
                self.detach(ram, next, root, true);
            }
        }
    }

    /// Returns what has to be invalidated when the descriptor `word` is taken away.
    fn pending_of(&self, ram: &Ram, place: &Place, index: usize, word: u64) -> Pending {
        let mut pending = Pending::new(place.regime);
        self.add_word(ram, place, index, word, &mut pending);
        pending
    }

    fn add_word(&self, ram: &Ram, place: &Place, index: usize, word: u64, pending: &mut Pending) {
        let (ia, size) = (place.ia_of(index), span(place.level));
        match decode(place.format, place.level, word) {
            Desc::Invalid => {}
            Desc::Leaf(leaf) => pending.add_leaf(ia, leaf.pa, size),
            Desc::Table { next, .. } => {
                pending.add_pointer(ia, size);
                self.add_table(ram, &place.below(index), next, pending);
            }
        }
    }

    fn add_table(&self, ram: &Ram, place: &Place, table: u64, pending: &mut Pending) {
        for (_, broken) in self.broken.range(table..table + PAGE) {
            pending.add(&broken.pending);
        }
        for (index, word) in words(ram, table) {
            self.add_word(ram, place, index, word, pending);
        }
    }

    /// Gives a table page back.
    pub(crate) fn free(&mut self, ram: &Ram, table: u64, out: &mut Vec<Violation>) {
        if matches!(self.roles.get(&table), Some(Role::Live(place)) if place.root == table) {
            self.retire_root(ram, table);
        }
        match self.roles.get(&table) {
            Some(Role::Live(_)) => {
                out.push(Violation::FreedWhileLinked { table });
                return;
            }
            Some(Role::Detached(..)) => out.push(Violation::FreedBeforeTlbi { table }),
            Some(Role::Freed) => out.push(Violation::FreedTwice { table }),
            None => {}
        }
        self.detached.retain(|&page| page != table);
        self.roles.insert(table, Role::Freed);
        self.initialised.remove(&table);
    }

    /// Follows an invalidation, which includes the barriers before and after it.
    pub(crate) fn invalidate(&mut self, scope: &Scope) {
        self.barrier();
        self.broken.retain(|_, broken| broken.pending.apply(scope));
        let Self { roles, initialised, .. } = self;
        self.detached.retain(|page| {
            let left = match roles.get_mut(page) {
                Some(Role::Detached(_, pending)) => pending.apply(scope),
                _ => false,
            };
            if !left {
                roles.remove(page);
                initialised.remove(page);
            }
            left
        });
    }

    /// Follows a barrier that orders descriptor stores before later walks.
    pub(crate) fn barrier(&mut self) {
        self.unordered.clear();
        self.unpublished.clear();
    }

    /// Returns the live descriptors written since the last barrier.
    pub(crate) fn unordered(&self) -> &[u64] {
        &self.unordered
    }

    /// Follows a write of one word that is not a descriptor write.
    pub(crate) fn raw_word(&mut self, pa: u64, out: &mut Vec<Violation>) {
        let page = page_of(pa);
        if matches!(self.roles.get(&page), Some(Role::Live(_) | Role::Detached(..))) {
            out.push(Violation::BypassedWrite { pa });
        }
        if let Some(mask) = self.initialised.get_mut(&page) {
            mask[word_of(pa) / 64] &= !(1 << (word_of(pa) % 64));
        }
    }

    /// Follows the wiping of a page, beyond its [zeroing](Self::zeroed).
    pub(crate) fn wiped(&mut self, page: u64) {
        self.maintained.wiped(page);
    }

    /// Follows the cleaning of a page.
    pub(crate) fn cleaned(&mut self, page: u64) {
        self.maintained.cleaned(page);
    }

    /// Tells whether something was taken away that TLBs may still hold.
    pub(crate) fn is_anything_pending(&self) -> bool {
        !self.broken.is_empty() || !self.detached.is_empty()
    }

    /// Follows the zeroing of a page, which makes it fit to be a table.
    pub(crate) fn zeroed(&mut self, page: u64, out: &mut Vec<Violation>) {
        match self.roles.get(&page) {
            Some(Role::Live(_) | Role::Detached(..)) => out.push(Violation::BypassedWrite { pa: page }),
            Some(Role::Freed) => drop(self.roles.remove(&page)),
            None => {}
        }
        self.initialised.insert(page, [u64::MAX; WORDS / 64]);
    }

    /// Returns where a revoked translation may still reach `range`, and whose it is, leaving out the
    /// translations of `except`.
    pub(crate) fn revoked(&self, range: &Range, except: Option<Regime>) -> Option<(u64, Regime)> {
        let detached = self.detached.iter().filter_map(|page| match self.roles.get(page) {
            Some(Role::Detached(_, pending)) => Some(pending),
            _ => None,
        });
        let broken = self.broken.values().map(|broken| &broken.pending);
        broken
            .chain(detached)
            .filter(|pending| Some(pending.regime) != except)
            .find_map(|pending| Some((pending.reaches(range)?, pending.regime)))
    }

    /// Returns a page of a range that walks may reach as a table.
    fn table_in(&self, range: &Range) -> Option<u64> {
        if range.end - range.start == PAGE {
            return self.is_table(range.start).then_some(range.start);
        }
        let tables =
            self.roles.iter().filter(|(_, role)| !matches!(role, Role::Freed)).map(|(page, _)| *page);
        tables.filter(|page| (range.start..range.end).contains(page)).min()
    }

    /// Tells whether walks may reach a page as a table.
    pub(crate) fn is_table(&self, page: u64) -> bool {
        matches!(self.roles.get(&page), Some(Role::Live(_) | Role::Detached(..)))
    }
}

/// Returns the words of a page that are not zero, with their indices.
fn words(ram: &Ram, page: u64) -> impl Iterator<Item = (usize, u64)> {
    ram.words(page).into_iter().flatten().copied().enumerate().filter(|&(_, word)| word != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Sim;
    use crate::testing::{RAM, RO, RW, XN, block, machine, page, table};

    const VM: u16 = 7;
    const VM_REGIME: Regime = Regime::Stage2 { vmid: VM };
    const KIND: TableKind = TableKind::Stage2 { vmid: VM, ipa_bits: 39 };
    /// Tables of the tree that [`tree`] builds, for levels 1, 2 and 3; a spare one; data pages.
    const L1: u64 = RAM;
    const L2: u64 = RAM + 0x1000;
    const L3: u64 = RAM + 0x2000;
    const SPARE: u64 = RAM + 0x3000;
    const OTHER_ROOT: u64 = RAM + 0x4000;
    const DATA: u64 = RAM + 0x20_0000;
    /// Descriptor of the page at IPA 0, and of the 2 MiB block at IPA 2 MiB.
    const PAGE_DESC: u64 = L3;
    const BLOCK_DESC: u64 = L2 + 8;
    const BLOCK_IPA: u64 = 0x20_0000;

    /// Builds a machine with a tree in which IPA 0 is a page and IPA 2 MiB is a block.
    fn tree() -> Sim {
        let sim = machine();
        for pa in [L1, L2, L3, SPARE, OTHER_ROOT] {
            sim.zero_page(pa);
        }
        sim.write_desc(L1, table(L2));
        sim.dsb_ishst();
        sim.table_root(L1, KIND);
        sim.write_desc(L2, table(L3));
        sim.write_desc(PAGE_DESC, page(DATA, RW));
        sim.write_desc(BLOCK_DESC, block(DATA, RW));
        assert_eq!(sim.violations(), []);
        sim
    }

    #[track_caller]
    fn clean(sim: &Sim) {
        assert_eq!(sim.violations(), []);
    }

    #[track_caller]
    fn only(sim: &Sim, violation: Violation) {
        assert_eq!(sim.violations(), [violation]);
    }

    #[test]
    fn break_invalidate_make_is_clean() {
        let sim = tree();
        sim.write_desc(PAGE_DESC, 0);
        sim.tlbi_stage2_ipa(0, VM, 0, PAGE);
        sim.write_desc(PAGE_DESC, page(DATA + 0x1000, RO));
        clean(&sim);
    }

    #[test]
    fn software_bits_change_in_place() {
        let sim = tree();
        for sw in [1, 15, 0] {
            sim.write_desc(PAGE_DESC, page(DATA, RW | sw << 55));
        }
        clean(&sim);
    }

    #[test]
    fn anything_else_does_not_change_in_place() {
        for new in [page(DATA + 0x1000, RW), page(DATA, RO), page(DATA, RW | XN), page(DATA, RW & !(1 << 2))]
        {
            let sim = tree();
            sim.write_desc(PAGE_DESC, new);
            only(&sim, Violation::ValidToValid { pa: PAGE_DESC, old: page(DATA, RW), new });
        }
    }

    #[test]
    fn block_does_not_become_a_table_in_place() {
        let sim = tree();
        sim.write_desc(BLOCK_DESC, table(SPARE));
        only(&sim, Violation::ValidToValid { pa: BLOCK_DESC, old: block(DATA, RW), new: table(SPARE) });
    }

    #[test]
    fn make_needs_the_invalidation_of_the_break() {
        type Step = fn(&Sim);
        let insufficient: [(&str, Step); 6] = [
            ("nothing", |_| {}),
            ("barrier only", Sim::dsb_ishst),
            ("wrong VMID", |sim| sim.tlbi_stage2_ipa(0, VM + 1, BLOCK_IPA, 0x20_0000)),
            ("wrong address", |sim| sim.tlbi_stage2_ipa(0, VM, 0, 0x20_0000)),
            ("too short", |sim| sim.tlbi_stage2_ipa(0, VM, BLOCK_IPA, 0x1f_f000)),
            ("EL2's", |sim| sim.tlbi_hyp_va(0, BLOCK_IPA, 0x20_0000)),
        ];
        let sufficient: [(&str, Step); 4] = [
            ("range", |sim| sim.tlbi_stage2_ipa(1, VM, BLOCK_IPA, 0x20_0000)),
            ("two halves", |sim| {
                sim.tlbi_stage2_ipa(0, VM, BLOCK_IPA + 0x10_0000, 0x10_0000);
                sim.tlbi_stage2_ipa(0, VM, BLOCK_IPA, 0x10_0000);
            }),
            ("VMID", |sim| sim.tlbi_stage2_vmid(0, VM)),
            ("all", |sim| sim.tlbi_all(0)),
        ];
        let (old, new) = (block(DATA, RW), table(SPARE));
        let run = |step: Step| {
            let sim = tree();
            sim.write_desc(BLOCK_DESC, 0b1000);
            step(&sim);
            sim.write_desc(BLOCK_DESC, new);
            sim.violations()
        };
        for (name, step) in insufficient {
            assert_eq!(run(step), [Violation::MadeBeforeTlbi { pa: BLOCK_DESC, old, new }], "{name}");
        }
        for (name, step) in sufficient {
            assert_eq!(run(step), [], "{name}");
        }
    }

    #[test]
    fn el2_entry_is_cleaned_by_an_el2_invalidation() {
        for (clean, root) in [(false, SPARE), (true, OTHER_ROOT)] {
            let sim = machine();
            for pa in [L1, L2, L3, root] {
                sim.zero_page(pa);
            }
            sim.write_desc(root, table(L1));
            sim.write_desc(L1, table(L2));
            sim.write_desc(L2, table(L3));
            sim.dsb_ishst();
            sim.table_root(root, TableKind::El2 { va_bits: 48 });
            sim.write_desc(L3 + 8, page(DATA, 1 << 10));
            sim.write_desc(L3 + 8, 0);
            if clean {
                sim.tlbi_hyp_va(0, PAGE, PAGE)
            } else {
                sim.tlbi_all(0)
            }
            sim.write_desc(L3 + 8, page(DATA + PAGE, 1 << 10));
            assert_eq!(sim.violations().is_empty(), clean);
        }
    }

    #[test]
    fn restoring_the_same_translation_needs_no_invalidation() {
        let sim = tree();
        sim.write_desc(PAGE_DESC, 0);
        sim.write_desc(PAGE_DESC, page(DATA, RW | 1 << 55));
        clean(&sim);
        sim.write_desc(BLOCK_DESC - 8, 0);
        sim.write_desc(BLOCK_DESC - 8, table(L3));
        clean(&sim);
        assert!(sim.is_table(L3));
        sim.tlbi_stage2_vmid(0, VM);
        assert!(sim.is_table(L3), "it is linked again");
        sim.write_desc(PAGE_DESC + 8, page(DATA, RW));
        sim.write_desc(PAGE_DESC + 8, page(DATA, RO));
        assert_eq!(sim.violations().len(), 1, "and followed again");
    }

    #[test]
    fn annotation_over_a_broken_entry_does_not_clean_it() {
        let sim = tree();
        sim.write_desc(PAGE_DESC, 0b1000);
        sim.write_desc(PAGE_DESC, 0xabc0);
        let new = page(DATA + PAGE, RW);
        sim.write_desc(PAGE_DESC, new);
        only(&sim, Violation::MadeBeforeTlbi { pa: PAGE_DESC, old: page(DATA, RW), new });
    }

    #[test]
    fn folding_a_table_needs_every_leaf_below_invalidated() {
        for (bytes, clean) in [(PAGE, false), (0x20_0000, true)] {
            let sim = tree();
            sim.write_desc(PAGE_DESC + 8, page(DATA + PAGE, RW));
            sim.write_desc(L2, 0);
            sim.tlbi_stage2_ipa(0, VM, 0, bytes);
            sim.write_desc(L2, block(DATA, RW));
            assert_eq!(sim.violations().is_empty(), clean, "{bytes:#x}");
        }
    }

    #[test]
    fn folding_a_table_without_leaves_needs_one_invalidation_for_its_pointer() {
        for touch in [false, true] {
            let sim = tree();
            sim.write_desc(PAGE_DESC, 0);
            sim.tlbi_stage2_ipa(0, VM, 0, PAGE);
            sim.write_desc(L2, 0);
            if touch {
                sim.tlbi_stage2_ipa(0, VM, 0x1f_f000, PAGE);
            }
            sim.free_table(L3);
            sim.write_desc(L2, block(DATA, RW));
            assert_eq!(sim.violations().is_empty(), touch);
        }
    }

    #[test]
    fn malformed_descriptors_are_reported_where_they_stand() {
        for (pa, word) in [
            (PAGE_DESC + 8, DATA | RW | 0b01),
            (BLOCK_DESC + 8, block(DATA + PAGE, RW)),
            (PAGE_DESC + 8, page(DATA, RW | 1 << 52)),
        ] {
            let sim = tree();
            sim.write_desc(pa, word);
            only(&sim, Violation::Malformed { pa, word });
        }
        let sim = tree();
        sim.write_desc(SPARE + 8, DATA | RW | 0b01);
        sim.dsb_ishst();
        clean(&sim);
        sim.write_desc(L2 + 16, table(SPARE));
        only(&sim, Violation::Malformed { pa: SPARE + 8, word: DATA | RW | 0b01 });
    }

    #[test]
    fn table_is_initialised_before_it_is_linked() {
        let fresh = RAM + 0x9000;
        let link = |sim: &Sim| {
            sim.write_desc(L2 + 16, table(fresh));
            sim.violations()
        };
        assert_eq!(link(&tree()), [Violation::UninitialisedTable { table: fresh }]);
        let sim = tree();
        sim.zero_page(fresh);
        assert_eq!(link(&sim), []);
        let sim = tree();
        sim.wipe_page(fresh);
        assert_eq!(link(&sim), []);
        let sim = tree();
        (0..511).for_each(|index| sim.write_desc(fresh + index * 8, page(DATA + index * PAGE, RW)));
        sim.dsb_ishst();
        assert_eq!(link(&sim), [Violation::UninitialisedTable { table: fresh }]);
        let sim = tree();
        (0..512).for_each(|index| sim.write_desc(fresh + index * 8, page(DATA + index * PAGE, RW)));
        sim.dsb_ishst();
        assert_eq!(link(&sim), []);
        let sim = tree();
        sim.zero_page(fresh);
        sim.store64(fresh + 800, 0);
        assert_eq!(link(&sim), [Violation::UninitialisedTable { table: fresh }]);
        let sim = tree();
        sim.zero_page(fresh);
        sim.free_table(fresh);
        assert_eq!(link(&sim), [Violation::UninitialisedTable { table: fresh }]);
    }

    #[test]
    fn table_that_was_unlinked_is_initialised_again_before_it_is_linked() {
        let sim = tree();
        sim.write_desc(L2, 0);
        sim.tlbi_stage2_vmid(0, VM);
        sim.write_desc(L2 + 16, table(L3));
        only(&sim, Violation::UninitialisedTable { table: L3 });
    }

    #[test]
    fn root_is_initialised_and_aligned() {
        let sim = machine();
        sim.table_root(SPARE, KIND);
        only(&sim, Violation::UninitialisedTable { table: SPARE });
        let sim = tree();
        sim.table_root(SPARE, TableKind::Stage2 { vmid: 9, ipa_bits: 40 });
        only(&sim, Violation::MisplacedTable { table: SPARE });
    }

    #[test]
    fn both_concatenated_root_tables_are_live() {
        let sim = machine();
        sim.zero_page(OTHER_ROOT);
        sim.zero_page(OTHER_ROOT + PAGE);
        sim.table_root(OTHER_ROOT, TableKind::Stage2 { vmid: VM, ipa_bits: 40 });
        let last = OTHER_ROOT + 0x1ff8;
        sim.write_desc(last, block(0x8000_0000, RW));
        sim.write_desc(last, 0);
        sim.tlbi_stage2_ipa(0, VM, (1 << 40) - (1 << 30), 1 << 30);
        sim.write_desc(last, block(0xc000_0000, RW));
        clean(&sim);
        sim.write_desc(last, 0);
        sim.tlbi_stage2_ipa(0, VM, (1 << 39) - (1 << 30), 1 << 30);
        sim.write_desc(last, block(0x8000_0000, RW));
        assert_eq!(sim.violations().len(), 1);
    }

    #[test]
    fn table_outside_ram_is_misplaced() {
        let sim = tree();
        sim.write_desc(L2 + 16, table(0x1000));
        only(&sim, Violation::MisplacedTable { table: 0x1000 });
    }

    #[test]
    fn table_is_linked_once() {
        let sim = tree();
        sim.write_desc(L2 + 16, table(L3));
        only(&sim, Violation::LinkedTwice { table: L3 });
        let sim = tree();
        sim.write_desc(L2 + 16, table(L2));
        only(&sim, Violation::LinkedTwice { table: L2 });
    }

    #[test]
    fn descriptor_is_not_written_into_a_freed_table() {
        let sim = tree();
        sim.write_desc(L2, 0);
        sim.tlbi_stage2_vmid(0, VM);
        sim.free_table(L3);
        clean(&sim);
        sim.store64(L3, 0);
        clean(&sim);
        sim.write_desc(L3 + 8, 0);
        only(&sim, Violation::WriteAfterFree { pa: L3 + 8 });
        sim.zero_page(L3);
        sim.write_desc(L3 + 8, 0);
        assert_eq!(sim.violations().len(), 1, "zeroing takes the page into use again");
    }

    #[test]
    fn table_is_not_freed_while_linked() {
        let sim = tree();
        sim.free_table(L3);
        only(&sim, Violation::FreedWhileLinked { table: L3 });
        assert!(sim.is_table(L3));
    }

    #[test]
    fn table_is_not_freed_or_written_before_it_is_invalidated() {
        let sim = tree();
        sim.write_desc(L2, 0);
        sim.write_desc(L3, 0);
        clean(&sim);
        sim.write_desc(L3, page(DATA, RW));
        only(&sim, Violation::WriteBeforeTlbi { pa: L3 });
        sim.free_table(L3);
        assert_eq!(sim.violations().get(1), Some(&Violation::FreedBeforeTlbi { table: L3 }));
        sim.free_table(L3);
        assert_eq!(sim.violations().get(2), Some(&Violation::FreedTwice { table: L3 }));
    }

    #[test]
    fn table_that_was_freed_too_early_stays_freed() {
        let sim = tree();
        sim.write_desc(L2, 0);
        sim.free_table(L3);
        sim.tlbi_stage2_vmid(0, VM);
        sim.write_desc(L3, 0);
        let early = Violation::FreedBeforeTlbi { table: L3 };
        assert_eq!(sim.violations(), [early, Violation::WriteAfterFree { pa: L3 }]);
    }

    #[test]
    fn entry_broken_inside_a_table_still_counts_when_the_table_is_unlinked() {
        let sim = tree();
        sim.write_desc(PAGE_DESC, 0);
        sim.write_desc(L2, 0);
        sim.tlbi_stage2_ipa(0, VM, PAGE, PAGE);
        sim.free_table(L3);
        only(&sim, Violation::FreedBeforeTlbi { table: L3 });
        let new = block(DATA, RW);
        sim.write_desc(L2, new);
        assert_eq!(sim.violations().get(1), Some(&Violation::MadeBeforeTlbi { pa: L2, old: table(L3), new }));
    }

    #[test]
    fn whole_subtree_is_detached_and_freed_after_one_invalidation() {
        let sim = tree();
        sim.write_desc(L1, 0);
        assert!(sim.is_table(L2) && sim.is_table(L3));
        sim.tlbi_stage2_ipa(0, VM, 0, 1 << 30);
        assert!(!sim.is_table(L2) && !sim.is_table(L3));
        sim.free_table(L2);
        sim.free_table(L3);
        clean(&sim);
    }

    #[test]
    fn tree_is_freed_after_its_root_is_retired_and_its_vmid_invalidated() {
        let sim = tree();
        sim.retire_root(L1);
        sim.tlbi_stage2_vmid(0, VM);
        [L3, L2, L1].iter().for_each(|&table| sim.free_table(table));
        clean(&sim);
        let sim = tree();
        sim.free_table(L1);
        only(&sim, Violation::FreedBeforeTlbi { table: L1 });
    }

    #[test]
    fn pages_of_a_retired_tree_are_taken_away_by_an_invalidation() {
        let sim = tree();
        sim.retire_root(L1);
        sim.wipe_page(DATA);
        only(&sim, Violation::WipedBeforeTaken { page: DATA, held_by: VM_REGIME });
        sim.tlbi_stage2_vmid(0, VM);
        sim.wipe_page(DATA);
        assert_eq!(sim.violations().len(), 1);
    }

    #[test]
    fn retired_root_is_initialised_again_before_it_is_used_again() {
        let sim = tree();
        sim.table_root(SPARE, TableKind::Stage2 { vmid: 9, ipa_bits: 39 });
        sim.retire_root(SPARE);
        clean(&sim);
        sim.table_root(SPARE, TableKind::Stage2 { vmid: 9, ipa_bits: 39 });
        only(&sim, Violation::UninitialisedTable { table: SPARE });
    }

    #[test]
    fn emptied_concatenated_root_is_freed_without_more_ado() {
        let sim = machine();
        sim.zero_page(OTHER_ROOT);
        sim.zero_page(OTHER_ROOT + PAGE);
        sim.table_root(OTHER_ROOT, TableKind::Stage2 { vmid: VM, ipa_bits: 40 });
        sim.free_table(OTHER_ROOT);
        sim.free_table(OTHER_ROOT + PAGE);
        clean(&sim);
    }

    #[test]
    fn live_and_detached_tables_are_written_by_descriptor_writes_only() {
        type Step = fn(&Sim);
        let writes: [Step; 4] = [
            |sim| sim.store64(L3, 0),
            |sim| sim.write_bytes(L3, &[0]),
            |sim| sim.zero_page(L3),
            |sim| sim.wipe_page(L3),
        ];
        for write in writes {
            let sim = tree();
            write(&sim);
            only(&sim, Violation::BypassedWrite { pa: L3 });
            let sim = tree();
            sim.write_desc(L2, 0);
            write(&sim);
            only(&sim, Violation::BypassedWrite { pa: L3 });
        }
    }

    #[test]
    fn access_is_taken_from_one_before_it_is_given_to_another() {
        for revoked in [true, false] {
            let sim = tree();
            sim.table_root(OTHER_ROOT, TableKind::Stage2 { vmid: 1, ipa_bits: 39 });
            sim.write_desc(BLOCK_DESC, 0);
            if revoked {
                sim.tlbi_stage2_ipa(0, VM, BLOCK_IPA, 0x20_0000);
            }
            let pa = OTHER_ROOT;
            sim.write_desc(pa, block(RAM, RW));
            let given = Violation::GivenBeforeTaken { pa, output: DATA, held_by: VM_REGIME };
            let mut violations = sim.violations();
            violations.retain(|violation| !matches!(violation, Violation::TableExposed { .. }));
            assert_eq!(violations, if revoked { vec![] } else { vec![given] });
        }
    }

    #[test]
    fn a_table_is_linked_after_its_descriptors_are_published() {
        for (barrier, clean) in [(false, false), (true, true)] {
            let sim = tree();
            sim.write_desc(SPARE + 8, page(DATA, RW));
            if barrier {
                sim.dsb_ishst();
            }
            sim.write_desc(L2 + 16, table(SPARE));
            let early = Violation::UnpublishedTable { table: SPARE };
            assert_eq!(sim.violations(), if clean { vec![] } else { vec![early] });
        }
    }

    #[test]
    fn a_root_is_taken_into_use_after_all_below_it_is_published() {
        for (barrier, unpublished) in [(false, vec![OTHER_ROOT, SPARE]), (true, vec![])] {
            let sim = tree();
            sim.write_desc(SPARE + 8, block(DATA, RW));
            sim.write_desc(OTHER_ROOT, table(SPARE));
            if barrier {
                sim.dsb_ishst();
            }
            sim.table_root(OTHER_ROOT, TableKind::Stage2 { vmid: 1, ipa_bits: 39 });
            let unpublished = unpublished.into_iter().map(|table| Violation::UnpublishedTable { table });
            assert_eq!(sim.violations(), unpublished.collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_table_is_linked_elsewhere_after_its_old_place_is_invalidated() {
        let sim = tree();
        sim.write_desc(L2, 0);
        sim.write_desc(L2 + 16, table(L3));
        only(&sim, Violation::LinkedBeforeTlbi { table: L3 });
    }

    #[test]
    fn a_table_is_mapped_by_no_stage_2() {
        let sim = tree();
        let pa = PAGE_DESC + 8;
        sim.write_desc(pa, page(L3, RO));
        only(&sim, Violation::TableExposed { pa, table: L3 });
        let sim = tree();
        sim.write_desc(BLOCK_DESC + 8, block(RAM, RW));
        only(&sim, Violation::TableExposed { pa: BLOCK_DESC + 8, table: L1 });
        let sim = tree();
        sim.write_desc(L2, 0);
        sim.write_desc(BLOCK_DESC + 8 * 2, block(RAM, RW));
        assert!(sim.violations().contains(&Violation::TableExposed { pa: BLOCK_DESC + 16, table: L1 }));
        let sim = tree();
        sim.write_desc(L1, 0);
        sim.tlbi_stage2_vmid(0, VM);
        sim.write_desc(L1 + 8, block(0x8000_0000, RW));
        clean(&sim);
    }

    #[test]
    fn page_may_move_within_one_translation_before_it_is_invalidated() {
        let sim = tree();
        sim.write_desc(BLOCK_DESC, 0);
        sim.write_desc(BLOCK_DESC + 8, block(DATA, RW));
        clean(&sim);
    }

    #[test]
    fn page_is_wiped_after_access_is_taken_away() {
        let page_in_block = DATA + 0x5000;
        for revoked in [true, false] {
            let sim = tree();
            sim.write_desc(BLOCK_DESC, 0);
            if revoked {
                sim.tlbi_stage2_vmid(0, VM);
            }
            sim.wipe_page(page_in_block);
            let wiped = Violation::WipedBeforeTaken { page: page_in_block, held_by: VM_REGIME };
            assert_eq!(sim.violations(), if revoked { vec![] } else { vec![wiped] });
        }
    }

    #[test]
    fn a_page_is_wiped_and_cleaned_for_another_after_it_is_taken_away() {
        type Step = fn(&Sim);
        let (wipe, clean): (Step, Step) = (|sim| sim.wipe_page(DATA), |sim| sim.clean_page(DATA));
        // A page that a guest keeps is cleaned for it while it has it.
        for (vmid, step, is_early) in [(0, wipe, true), (0, clean, true), (9, wipe, true), (9, clean, false)]
        {
            let (sim, held_by) = (tree(), Regime::Stage2 { vmid });
            sim.write_desc(PAGE_DESC, 0);
            sim.write_desc(BLOCK_DESC, 0);
            sim.tlbi_stage2_vmid(0, VM);
            sim.wipe_page(DATA);
            sim.table_root(OTHER_ROOT, TableKind::Stage2 { vmid, ipa_bits: 39 });
            sim.write_desc(OTHER_ROOT + 8, block(0x4000_0000, RW));
            let before = sim.violations();
            step(&sim);
            sim.write_desc(OTHER_ROOT + 8, 0);
            let early = Violation::MaintainedBeforeTaken { page: DATA, held_by };
            assert_eq!(sim.violations()[before.len()..], if is_early { vec![early] } else { vec![] }[..]);
        }
    }

    #[test]
    fn what_tlbs_may_still_hold_is_pending() {
        let sim = tree();
        assert!(!sim.is_anything_pending());
        sim.write_desc(PAGE_DESC, 0);
        assert!(sim.is_anything_pending());
        sim.tlbi_stage2_ipa(0, VM, PAGE, PAGE);
        assert!(sim.is_anything_pending(), "that was its neighbour");
        sim.tlbi_stage2_ipa(0, VM, 0, PAGE);
        assert!(!sim.is_anything_pending());
    }

    #[test]
    fn pages_of_an_unlinked_table_count_as_not_taken_away() {
        let sim = tree();
        sim.write_desc(L2, 0);
        sim.wipe_page(DATA + PAGE);
        clean(&sim);
        sim.wipe_page(DATA);
        only(&sim, Violation::WipedBeforeTaken { page: DATA, held_by: VM_REGIME });
    }
}
