//! Accesses of CPUs through translation, as adversarial hardware makes them.

use std::collections::BTreeMap;

use crate::pending::Range;
use crate::ram::Ram;
use crate::tlb::{Cached, Tlb};
use crate::walk::{
    Access, El2Stage1, Fault, FaultKind, Found, Leaf, Regime, Space, Stage2, TablePointer, Visitor, explore,
    grants, leaves, walk, walk_from,
};
use crate::{Sim, State};

/// What a stale TLB entry holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StaleKind {
    /// A translation that the tables no longer grant in full.
    Leaf(Leaf),
    /// A pointer to a table that the tables no longer link there.
    Table {
        /// The table page.
        table: u64,
    },
}

/// A TLB entry that grants more than the present tables (invariant: when a call returns there is none).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StaleEntry {
    /// Whose TLB.
    pub cpu: usize,
    /// Whose translation.
    pub regime: Regime,
    /// First input address.
    pub ia: u64,
    /// Input addresses covered, in bytes.
    pub size: u64,
    /// What it holds.
    pub kind: StaleKind,
}

impl std::fmt::Display for StaleEntry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { cpu, regime, ia, size, kind } = self;
        write!(
            f,
            "the TLB of CPU {cpu} still has for {regime}, from its page {:#x} on, {} pages ",
            ia >> 12,
            size >> 12
        )?;
        match kind {
            StaleKind::Leaf(leaf) => {
                let write = if leaf.write { " to write" } else { "" };
                write!(f, "at page {:#x}{write}, which the tables do not grant", leaf.pa >> 12)
            }
            StaleKind::Table { table } => {
                write!(f, "behind the table in page {:#x}, which the tables do not link", table >> 12)
            }
        }
    }
}

/// Returns what an access through translation reaches, if it is permitted.
fn output(leaf: &Leaf, ia: u64, access: Access) -> Result<u64, Fault> {
    if leaf.permits(access) {
        Ok(leaf.pa + (ia - leaf.ipa))
    } else {
        Err(Fault { level: leaf.level(), kind: FaultKind::Permission })
    }
}

impl State {
    #[track_caller]
    fn tlb(&mut self, cpu: usize) -> &mut Tlb {
        let cpus = self.tlbs.len();
        self.tlbs.get_mut(cpu).unwrap_or_else(|| panic!("sim: there is no CPU {cpu} of {cpus}"))
    }

    /// Makes an access: uses any cached translation that permits it, one that differs from the present
    /// tables first; caches what it finds.
    #[track_caller]
    fn access(&mut self, cpu: usize, space: &Space, ia: u64, access: Access) -> Result<u64, Fault> {
        let _ = self.tlb(cpu);
        let mut seen = Vec::new();
        let fresh =
            walk(&self.ram, space, ia, |found| seen.push(found)).and_then(|leaf| output(&leaf, ia, access));
        let cached = self.cached(cpu, space, ia);
        let permitted = cached.iter().filter(|&leaf| output(leaf, ia, access).is_ok());
        let differs = |leaf: &&Leaf| output(leaf, ia, access) != fresh;
        let chosen = permitted.clone().find(differs).or_else(|| permitted.clone().next()).copied();
        if let Some(leaf) = chosen {
            seen.push(Found::Leaf(leaf));
        }
        for found in seen {
            self.tlb(cpu).insert(space.regime, found);
        }
        chosen.map_or(fresh, |leaf| output(&leaf, ia, access))
    }

    /// Returns every translation of `ia` that the CPU can come to from what it has cached.
    fn cached(&self, cpu: usize, space: &Space, ia: u64) -> Vec<Leaf> {
        let Some(tlb) = self.tlbs.get(cpu) else { return Vec::new() };
        tlb.lookup(space.regime, ia)
            .filter_map(|cached| match cached {
                Cached::Leaf(leaf) => Some(leaf),
                Cached::Table(pointer) => walk_from(&self.ram, space.format, pointer, ia, |_| {}).ok(),
            })
            .collect()
    }

    #[track_caller]
    fn speculate(&mut self, cpu: usize, space: &Space) {
        let _ = self.tlb(cpu);
        let Self { ram, tlbs, .. } = self;
        if let Some(tlb) = tlbs.get_mut(cpu) {
            explore(ram, space, &mut Speculation { ram, tlb, regime: space.regime });
        }
    }

    /// Declares which tables a regime stands for, if any.
    pub(crate) fn stand_for(&mut self, regime: Regime, space: Option<Space>) {
        match space {
            Some(space) => drop(self.current.insert(regime, space)),
            None => drop(self.current.remove(&regime)),
        }
        self.tables.changed(regime, Range::ALL);
    }

    /// Turns an output address into one that can be loaded from and stored to.
    fn memory(&self, pa: u64) -> Result<u64, Fault> {
        if self.ram.contains(pa) { Ok(pa & !7) } else { Err(Fault { level: 0, kind: FaultKind::External }) }
    }
}

/// A TLB that caches whatever it may.
struct Speculation<'a> {
    ram: &'a Ram,
    tlb: &'a mut Tlb,
    regime: Regime,
}

impl Visitor for Speculation<'_> {
    /// All of a table is known if all of it was cached before, and since then neither has the table changed nor was
    /// anything of it forgotten.
    fn enter(&mut self, pointer: TablePointer, ia: u64) -> bool {
        self.tlb.fill(self.regime, ia, pointer, self.ram.version(pointer.table))
    }

    fn find(&mut self, found: Found) {
        self.tlb.insert(self.regime, found);
    }
}

/// Tells whether the present tables link a table where a cached pointer says.
fn links(ram: &Ram, space: &Space, ia: u64, pointer: TablePointer) -> bool {
    let mut linked = false;
    let _ = walk(ram, space, ia, |found| {
        linked |= matches!(found, Found::Table { pointer: present, .. } if present == pointer);
    });
    linked
}

/// Returns why an entry is stale, if it is.
fn stale(ram: &Ram, space: Option<&Space>, ia: u64, cached: Cached) -> Option<StaleKind> {
    match cached {
        Cached::Leaf(leaf) => {
            (!space.is_some_and(|space| grants(ram, space, &leaf))).then_some(StaleKind::Leaf(leaf))
        }
        Cached::Table(pointer) => (!space.is_some_and(|space| links(ram, space, ia, pointer)))
            .then_some(StaleKind::Table { table: pointer.table }),
    }
}

impl Sim {
    /// Makes an access of a CPU through stage 2 and returns the physical address that it reaches, as
    /// hardware would if it always did the worst: a cached translation that permits the access is used even
    /// if the tables no longer do.
    ///
    /// # Errors
    /// The fault that the hardware would take.
    ///
    /// # Panics
    /// When there is no such CPU or the IPA size is not supported.
    #[track_caller]
    pub fn access_stage2(&self, cpu: usize, stage2: Stage2, ipa: u64, access: Access) -> Result<u64, Fault> {
        self.lock().access(cpu, &stage2.into(), ipa, access)
    }

    /// Makes an access of EL2 on a CPU, in the manner of [`Sim::access_stage2`].
    ///
    /// # Errors
    /// The fault that the hardware would take.
    ///
    /// # Panics
    /// When there is no such CPU or the VA size is not supported.
    #[track_caller]
    pub fn access_el2(&self, cpu: usize, el2: El2Stage1, va: u64, access: Access) -> Result<u64, Fault> {
        self.lock().access(cpu, &el2.into(), va, access)
    }

    /// Caches every valid leaf that is reachable now, and every table pointer on the way: hardware may
    /// prefetch any of them at any time.
    ///
    /// # Panics
    /// When there is no such CPU or the IPA size is not supported.
    #[track_caller]
    pub fn speculate(&self, cpu: usize, stage2: Stage2) {
        self.lock().speculate(cpu, &stage2.into());
    }

    /// Caches everything that is reachable at EL2, in the manner of [`Sim::speculate`].
    ///
    /// # Panics
    /// When there is no such CPU or the VA size is not supported.
    #[track_caller]
    pub fn speculate_el2(&self, cpu: usize, el2: El2Stage1) {
        self.lock().speculate(cpu, &el2.into());
    }

    /// Walks the present tables for an IPA, without any TLB, and returns the leaf.
    ///
    /// # Errors
    /// A translation, access flag or external fault; permissions are not checked.
    #[track_caller]
    pub fn walk_stage2(&self, stage2: Stage2, ipa: u64) -> Result<Leaf, Fault> {
        walk(&self.lock().ram, &stage2.into(), ipa, |_| {})
    }

    /// Walks the present EL2 tables for a VA, in the manner of [`Sim::walk_stage2`].
    ///
    /// # Errors
    /// A translation, access flag or external fault; permissions are not checked.
    #[track_caller]
    pub fn walk_el2(&self, el2: El2Stage1, va: u64) -> Result<Leaf, Fault> {
        walk(&self.lock().ram, &el2.into(), va, |_| {})
    }

    /// Returns every leaf that the present tables reach, in the order of IPAs.
    #[track_caller]
    #[must_use]
    pub fn leaves_stage2(&self, stage2: Stage2) -> Vec<Leaf> {
        leaves(&self.lock().ram, &stage2.into())
    }

    /// Returns every leaf that the present EL2 tables reach, in the order of VAs.
    #[track_caller]
    #[must_use]
    pub fn leaves_el2(&self, el2: El2Stage1) -> Vec<Leaf> {
        leaves(&self.lock().ram, &el2.into())
    }

    /// Declares which tables a VMID stands for at present, for [`Sim::stale_entries`]; replaces what was
    /// declared for it before.
    #[track_caller]
    pub fn set_stage2(&self, stage2: Stage2) {
        let space = Space::from(stage2);
        self.lock().stand_for(space.regime, Some(space));
    }

    /// Declares that a VMID stands for no tables: every entry of it is stale.
    pub fn clear_stage2(&self, vmid: u16) {
        self.lock().stand_for(Regime::Stage2 { vmid }, None);
    }

    /// Declares which tables EL2 uses at present, for [`Sim::stale_entries`].
    #[track_caller]
    pub fn set_el2(&self, el2: El2Stage1) {
        let space = Space::from(el2);
        self.lock().stand_for(space.regime, Some(space));
    }

    /// Returns the TLB entries, of one CPU or of all, that grant more than the present tables of their
    /// regime: another output or more permissions, or a pointer to a table that is not linked there. An
    /// entry of a VMID for which no tables are declared is stale.
    #[must_use]
    pub fn stale_entries(&self, cpu: Option<usize>) -> Vec<StaleEntry> {
        let State { ram, tlbs, current, .. } = &*self.lock();
        let current: &BTreeMap<Regime, Space> = current;
        let mut entries = Vec::new();
        for (number, tlb) in
            tlbs.iter().enumerate().filter(|(number, _)| cpu.is_none_or(|cpu| cpu == *number))
        {
            for (regime, ia, size, cached) in tlb.entries() {
                if let Some(kind) = stale(ram, current.get(&regime), ia, cached) {
                    entries.push(StaleEntry { cpu: number, regime, ia, size, kind });
                }
            }
        }
        entries
    }

    /// Returns, of all CPUs, the entries that [`Sim::stale_entries`] would return and that were not stale or not
    /// there at the last call. Only what changed since then is looked at, so this is fast.
    #[must_use]
    pub fn new_stale_entries(&self) -> Vec<StaleEntry> {
        let State { ram, tlbs, current, tables, .. } = &mut *self.lock();
        let mut entries = Vec::new();
        for (regime, range) in tables.take_changed() {
            for (cpu, tlb) in tlbs.iter().enumerate() {
                for (ia, size, cached) in tlb.overlapping(regime, range) {
                    if let Some(kind) = stale(ram, current.get(&regime), ia, cached) {
                        let entry = StaleEntry { cpu, regime, ia, size, kind };
                        if !entries.contains(&entry) {
                            entries.push(entry);
                        }
                    }
                }
            }
        }
        entries
    }

    /// Loads the word at an IPA (rounded down to 8 bytes) as the host or a guest on a CPU does.
    ///
    /// # Errors
    /// The fault that the hardware would take; an external one where the output is not RAM.
    #[track_caller]
    pub fn guest_or_host_read(&self, cpu: usize, stage2: Stage2, ipa: u64) -> Result<u64, Fault> {
        let mut state = self.lock();
        let pa = state.access(cpu, &stage2.into(), ipa, Access::Read)?;
        let pa = state.memory(pa)?;
        Ok(state.ram.peek(pa).unwrap_or(0))
    }

    /// Stores a word at an IPA (rounded down to 8 bytes) as the host or a guest on a CPU does. A store that
    /// lands in a page table is done, and recorded as a violation.
    ///
    /// # Errors
    /// The fault that the hardware would take; an external one where the output is not RAM.
    #[track_caller]
    pub fn guest_or_host_write(&self, cpu: usize, stage2: Stage2, ipa: u64, value: u64) -> Result<(), Fault> {
        let mut state = self.lock();
        let pa = state.access(cpu, &stage2.into(), ipa, Access::Write)?;
        let pa = state.memory(pa)?;
        state.store(pa, value);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TableKind;
    use crate::testing::{RAM, RO, RW, XN, block, machine, page, table};

    const PAGE: u64 = 4096;
    const VMID: u16 = 7;
    const L1: u64 = RAM;
    const L2: u64 = RAM + 0x2000;
    const L3: u64 = RAM + 0x3000;
    const DATA: u64 = RAM + 0x20_0000;
    const BLOCK: u64 = 0x20_0000;
    const VM: Stage2 = Stage2 { vmid: VMID, root: L1, ipa_bits: 40 };
    const EL2: El2Stage1 = El2Stage1 { root: RAM + 0x8000, va_bits: 48 };
    const REGIME: Regime = Regime::Stage2 { vmid: VMID };

    /// Builds a machine in which IPA 0 is a page of [`DATA`] and IPA 2 MiB is a block of it.
    fn mapped() -> Sim {
        let sim = machine();
        for pa in [L1, L1 + PAGE, L2, L3] {
            sim.zero_page(pa);
        }
        sim.table_root(L1, TableKind::Stage2 { vmid: VMID, ipa_bits: 40 });
        sim.set_stage2(VM);
        sim.write_desc(L1, table(L2));
        sim.write_desc(L2, table(L3));
        sim.write_desc(L3, page(DATA, RW));
        sim.write_desc(L2 + 8, block(DATA, RW));
        sim
    }

    fn fault(level: u8, kind: FaultKind) -> Result<u64, Fault> {
        Err(Fault { level, kind })
    }

    #[test]
    fn access_reaches_the_output_address_of_pages_and_blocks() {
        let sim = mapped();
        assert_eq!(sim.access_stage2(0, VM, 0x123, Access::Read), Ok(DATA + 0x123));
        assert_eq!(sim.access_stage2(0, VM, BLOCK + 0x12_3456, Access::Execute), Ok(DATA + 0x12_3456));
        assert_eq!(sim.access_stage2(0, VM, PAGE, Access::Read), fault(3, FaultKind::Translation));
        assert_eq!(sim.access_stage2(0, VM, 1 << 40, Access::Read), fault(0, FaultKind::Translation));
        assert_eq!(sim.walk_stage2(VM, BLOCK + 5).map(|leaf| leaf.size), Ok(0x20_0000));
        assert_eq!(sim.leaves_stage2(VM).len(), 2);
        assert_eq!(sim.violations(), []);
    }

    #[test]
    fn upper_half_of_a_40_bit_space_is_in_the_second_root_table() {
        let sim = mapped();
        sim.write_desc(L1 + PAGE, block(RAM, RW));
        assert_eq!(sim.access_stage2(0, VM, 1 << 39 | 0x42, Access::Write), Ok(RAM + 0x42));
    }

    #[test]
    fn speculation_caches_again_what_was_forgotten_or_has_changed() {
        let sim = mapped();
        let taken = |sim: &Sim| {
            sim.write_desc(L3, 0);
            let held = sim.access_stage2(0, VM, 0, Access::Read);
            sim.write_desc(L3, page(DATA, RW));
            held
        };
        for _ in 0..2 {
            sim.speculate(0, VM);
            assert_eq!(taken(&sim), Ok(DATA));
            sim.tlbi_stage2_ipa(0, VMID, 0, PAGE);
            assert_eq!(taken(&sim), fault(3, FaultKind::Translation));
        }
        sim.write_desc(L3 + 8, page(DATA + PAGE, RW));
        sim.speculate(0, VM);
        sim.write_desc(L3 + 8, 0);
        assert_eq!(sim.access_stage2(0, VM, PAGE, Access::Read), Ok(DATA + PAGE));
        assert_eq!(taken(&sim), Ok(DATA), "the neighbours too");
    }

    #[test]
    fn permissions_are_checked_by_kind_of_access() {
        let sim = mapped();
        sim.write_desc(L3 + 8, page(DATA, RO | XN));
        assert_eq!(sim.access_stage2(0, VM, PAGE, Access::Read), Ok(DATA));
        assert_eq!(sim.access_stage2(0, VM, PAGE, Access::Write), fault(3, FaultKind::Permission));
        assert_eq!(sim.access_stage2(0, VM, PAGE, Access::Execute), fault(3, FaultKind::Permission));
        sim.write_desc(L2 + 16, block(DATA, 1 << 10 | XN));
        assert_eq!(sim.access_stage2(0, VM, 2 * BLOCK, Access::Read), fault(2, FaultKind::Permission));
    }

    #[test]
    fn stale_translation_is_usable_until_the_right_invalidation() {
        for ipa in [0, BLOCK + 0x5000] {
            let sim = mapped();
            let pa = sim.access_stage2(0, VM, ipa, Access::Write).unwrap();
            sim.write_desc(if ipa == 0 { L3 } else { L2 + 8 }, 0);
            let still = || sim.access_stage2(0, VM, ipa, Access::Write);
            assert_eq!(still(), Ok(pa), "no invalidation");
            sim.dsb_ishst();
            assert_eq!(still(), Ok(pa), "barrier");
            sim.tlbi_stage2_ipa(0, VMID + 1, 0, 1 << 40);
            sim.tlbi_stage2_vmid(0, 0);
            assert_eq!(still(), Ok(pa), "wrong VMID");
            sim.tlbi_stage2_ipa(0, VMID, 2 * BLOCK, 1 << 30);
            assert_eq!(still(), Ok(pa), "wrong address");
            sim.tlbi_hyp_va(0, 0, 1 << 40);
            sim.tlbi_hyp_all(0);
            assert_eq!(still(), Ok(pa), "EL2's invalidation");
            assert!(sim.access_stage2(1, VM, ipa, Access::Write).is_err(), "other CPU never cached it");
            sim.tlbi_stage2_ipa(1, VMID, ipa, PAGE);
            assert!(still().is_err(), "invalidated");
        }
    }

    #[test]
    fn invalidation_of_a_vmid_or_of_all_makes_a_translation_unusable() {
        for all in [false, true] {
            let sim = mapped();
            sim.speculate(0, VM);
            sim.write_desc(L3, 0);
            if all {
                sim.tlbi_all(0)
            } else {
                sim.tlbi_stage2_vmid(0, VMID)
            }
            assert_eq!(sim.access_stage2(0, VM, 0, Access::Read), fault(3, FaultKind::Translation));
        }
    }

    #[test]
    fn stale_permission_and_stale_output_are_preferred() {
        let sim = mapped();
        sim.speculate(0, VM);
        sim.write_desc(L3, page(DATA, RO));
        assert_eq!(sim.access_stage2(0, VM, 0, Access::Write), Ok(DATA));
        let sim = mapped();
        sim.speculate(0, VM);
        sim.write_desc(L3, page(DATA + PAGE, RW));
        sim.speculate(0, VM);
        assert_eq!(sim.access_stage2(0, VM, 0, Access::Write), Ok(DATA));
    }

    #[test]
    fn granting_more_takes_effect_at_once() {
        let sim = mapped();
        assert!(sim.access_stage2(0, VM, PAGE, Access::Read).is_err());
        sim.write_desc(L3 + 8, page(DATA, RW));
        assert_eq!(sim.access_stage2(0, VM, PAGE, Access::Read), Ok(DATA));
    }

    #[test]
    fn forbidden_translation_is_cached() {
        let sim = mapped();
        sim.write_desc(L3 + 8, page(DATA, RO));
        assert!(sim.access_stage2(0, VM, PAGE, Access::Write).is_err());
        sim.write_desc(L3 + 8, 0);
        assert_eq!(sim.access_stage2(0, VM, PAGE, Access::Read), Ok(DATA));
    }

    #[test]
    fn speculation_caches_what_was_never_accessed() {
        let sim = mapped();
        sim.speculate(1, VM);
        sim.write_desc(L2 + 8, 0);
        assert_eq!(sim.access_stage2(1, VM, BLOCK, Access::Read), Ok(DATA));
        assert!(sim.access_stage2(0, VM, BLOCK, Access::Read).is_err());
    }

    #[test]
    fn unlinked_table_is_walked_until_its_pointer_is_invalidated() {
        let sim = mapped();
        sim.write_desc(L2, 0);
        sim.write_desc(L3 + 8, page(DATA + PAGE, RW));
        assert_eq!(sim.access_stage2(0, VM, PAGE, Access::Read), fault(2, FaultKind::Translation));
        let sim = mapped();
        assert_eq!(sim.access_stage2(0, VM, 0, Access::Read), Ok(DATA));
        assert!(sim.access_stage2(0, VM, 2 * PAGE, Access::Read).is_err());
        sim.write_desc(L2, 0);
        sim.write_desc(L3 + 8, page(DATA + PAGE, RW));
        assert_eq!(sim.access_stage2(0, VM, PAGE, Access::Read), Ok(DATA + PAGE));
        sim.tlbi_stage2_ipa(0, VMID, 0x1f_f000, PAGE);
        assert_eq!(sim.access_stage2(0, VM, PAGE, Access::Read), Ok(DATA + PAGE), "the leaf was cached too");
        assert_eq!(sim.access_stage2(0, VM, 0, Access::Read), Ok(DATA), "from before");
        sim.tlbi_stage2_ipa(0, VMID, 0, 2 * PAGE);
        assert_eq!(sim.access_stage2(0, VM, PAGE, Access::Read), fault(2, FaultKind::Translation));
    }

    #[test]
    fn reused_vmid_without_invalidation_sees_the_old_vm() {
        let sim = mapped();
        sim.speculate(0, VM);
        let reused = Stage2 { root: RAM + 0x10_0000, ..VM };
        assert_eq!(sim.access_stage2(0, reused, 0, Access::Read), Ok(DATA));
        sim.set_stage2(reused);
        assert_eq!(sim.stale_entries(None).len(), 4);
        sim.tlbi_stage2_vmid(0, VMID);
        assert_eq!(sim.access_stage2(0, reused, 0, Access::Read), fault(1, FaultKind::Translation));
        assert_eq!(sim.stale_entries(None), []);
    }

    #[test]
    fn what_became_stale_is_told_once_and_is_what_a_full_look_finds() {
        let sim = mapped();
        sim.speculate(0, VM);
        sim.speculate(1, VM);
        assert_eq!(sim.new_stale_entries(), []);
        for (at, word) in [(L3, page(DATA, RO)), (L2 + 8, 0), (L2, 0)] {
            let before = sim.stale_entries(None);
            sim.write_desc(at, word);
            let mut told = [before, sim.new_stale_entries()].concat();
            told.sort_by_key(|entry| (entry.cpu, entry.ia, entry.size));
            told.dedup();
            let mut all = sim.stale_entries(None);
            all.sort_by_key(|entry| (entry.cpu, entry.ia, entry.size));
            assert_eq!(told, all);
            assert_eq!(sim.new_stale_entries(), []);
        }
        sim.clear_stage2(VMID);
        assert_eq!(sim.new_stale_entries().len(), sim.stale_entries(None).len());
    }

    #[test]
    fn stale_entries_name_cpu_address_and_content() {
        let sim = mapped();
        sim.speculate(1, VM);
        assert_eq!(sim.stale_entries(None), []);
        let leaf = sim.walk_stage2(VM, 0).unwrap();
        sim.write_desc(L3, page(DATA, RO));
        let stale = StaleEntry { cpu: 1, regime: REGIME, ia: 0, size: PAGE, kind: StaleKind::Leaf(leaf) };
        assert_eq!(sim.stale_entries(None), [stale]);
        assert_eq!(sim.stale_entries(Some(1)), [stale]);
        assert_eq!(sim.stale_entries(Some(0)), []);
    }

    #[test]
    fn stale_entries_show_unlinked_tables() {
        let sim = mapped();
        sim.speculate(0, VM);
        sim.write_desc(L3, 0);
        sim.tlbi_stage2_ipa(0, VMID, 0, PAGE);
        sim.speculate(0, VM);
        sim.write_desc(L2, 0);
        let kind = StaleKind::Table { table: L3 };
        let stale = StaleEntry { cpu: 0, regime: REGIME, ia: 0, size: 0x20_0000, kind };
        assert_eq!(sim.stale_entries(None), [stale]);
    }

    #[test]
    fn pointer_to_a_table_that_was_replaced_is_stale() {
        let sim = mapped();
        sim.write_desc(L3, 0);
        sim.tlbi_all(0);
        sim.speculate(0, VM);
        let other = L3 + PAGE;
        sim.zero_page(other);
        sim.write_desc(L2, table(other));
        let stale = sim.stale_entries(None);
        assert_eq!(
            stale.iter().map(|entry| entry.kind).collect::<Vec<_>>(),
            [StaleKind::Table { table: L3 }]
        );
    }

    #[test]
    fn entry_that_grants_less_or_the_same_is_not_stale() {
        let sim = mapped();
        sim.write_desc(L3 + 8, page(DATA, RO | XN));
        sim.speculate(0, VM);
        sim.write_desc(L3 + 8, page(DATA, RW | 1 << 55));
        assert_eq!(sim.stale_entries(None), []);
    }

    #[test]
    fn entries_of_a_vmid_without_tables_are_stale() {
        for retire in [false, true] {
            let sim = mapped();
            sim.speculate(0, VM);
            if retire {
                sim.retire_root(L1)
            } else {
                sim.clear_stage2(VMID)
            }
            assert_eq!(sim.stale_entries(None).len(), 4);
            sim.tlbi_stage2_vmid(0, VMID);
            assert_eq!(sim.stale_entries(None), []);
        }
    }

    #[test]
    fn loads_and_stores_go_through_translation() {
        let sim = mapped();
        assert_eq!(sim.guest_or_host_write(0, VM, BLOCK + 0x17, 99), Ok(()));
        assert_eq!(sim.load64(DATA + 0x10), 99);
        assert_eq!(sim.guest_or_host_read(1, VM, 0x10), Ok(99));
        assert!(sim.is_dirty(DATA));
        assert_eq!(sim.guest_or_host_read(0, VM, PAGE), fault(3, FaultKind::Translation));
        sim.write_desc(L3 + 8, page(DATA, RO));
        let denied = Err(Fault { level: 3, kind: FaultKind::Permission });
        assert_eq!(sim.guest_or_host_write(0, VM, PAGE, 1), denied);
        sim.write_desc(L3 + 16, page(0x900_0000, RW));
        assert_eq!(sim.access_stage2(0, VM, 2 * PAGE, Access::Read), Ok(0x900_0000));
        assert_eq!(sim.guest_or_host_read(0, VM, 2 * PAGE), fault(0, FaultKind::External));
    }

    #[test]
    fn store_of_a_guest_into_a_table_is_a_violation() {
        let sim = mapped();
        sim.write_desc(L3 + 8, page(L2, RW));
        assert_eq!(sim.guest_or_host_write(0, VM, PAGE + 8, 0), Ok(()));
        let exposed = crate::Violation::TableExposed { pa: L3 + 8, table: L2 };
        assert_eq!(sim.violations(), [exposed, crate::Violation::BypassedWrite { pa: L2 + 8 }]);
    }

    #[test]
    fn el2_has_a_regime_of_its_own() {
        let sim = mapped();
        let tables = [0, 1, 2, 3].map(|number| EL2.root + number * PAGE);
        for (at, next) in tables.iter().zip(&tables[1..]) {
            sim.zero_page(*next);
            sim.write_desc(*at, table(*next));
        }
        sim.write_desc(tables[3] + 8, page(DATA, 1 << 10 | 1 << 7 | 1 << 54));
        sim.set_el2(EL2);
        assert_eq!(sim.access_el2(0, EL2, PAGE + 4, Access::Read), Ok(DATA + 4));
        assert_eq!(sim.access_el2(0, EL2, PAGE, Access::Write), fault(3, FaultKind::Permission));
        assert_eq!(sim.access_el2(0, EL2, PAGE, Access::Execute), fault(3, FaultKind::Permission));
        assert_eq!(sim.walk_el2(EL2, PAGE).map(|leaf| leaf.pa), Ok(DATA));
        assert_eq!(sim.leaves_el2(EL2).len(), 1);
        sim.speculate_el2(1, EL2);
        sim.write_desc(tables[3] + 8, 0);
        assert_eq!(sim.stale_entries(None).len(), 2);
        sim.tlbi_all(0);
        assert_eq!(sim.access_el2(1, EL2, PAGE, Access::Read), Ok(DATA), "ALLE1IS spares EL2");
        sim.tlbi_hyp_va(0, 0, PAGE);
        assert_eq!(sim.access_el2(1, EL2, PAGE, Access::Read), Ok(DATA), "wrong address");
        sim.tlbi_hyp_va(0, PAGE, PAGE);
        assert_eq!(sim.access_el2(1, EL2, PAGE, Access::Read), fault(3, FaultKind::Translation));
        assert_eq!(sim.stale_entries(None), []);
        assert_eq!(sim.access_el2(0, EL2, 1 << 48, Access::Read), fault(0, FaultKind::Translation));
    }

    #[test]
    #[should_panic(expected = "there is no CPU 2 of 2")]
    fn access_by_a_cpu_that_does_not_exist_is_a_bug_of_the_caller() {
        let _ = mapped().access_stage2(2, VM, 0, Access::Read);
    }
}
