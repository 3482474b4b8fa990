//! What the hypervisor does to page tables and TLBs. A TLB operation here is the whole sequence that the
//! architecture asks for, with the barriers before and after it, broadcast to all CPUs.

use crate::format::span;
use crate::log::{Event, Violation};
use crate::ram::{PAGE, page_of};
use crate::tables::TableKind;
use crate::tlb::Scope;
use crate::walk::{Leaf, Regime};
use crate::{Sim, State};

impl State {
    #[track_caller]
    fn invalidate(&mut self, cpu: usize, scope: &Scope, event: Event) {
        assert!(cpu < self.tlbs.len(), "sim: there is no CPU {cpu}");
        for tlb in &mut self.tlbs {
            tlb.invalidate(scope);
        }
        self.tables.invalidate(scope);
        self.log.event(event);
    }
}

/// Returns the scope of all pages that a range touches.
fn range(regime: Regime, first: u64, bytes: u64) -> Scope {
    let end = first.saturating_add(bytes).checked_next_multiple_of(PAGE).unwrap_or(u64::MAX);
    Scope::Range { regime, start: page_of(first), end }
}

impl Sim {
    /// Writes a page-table descriptor: one atomic store that is ordered after all earlier ones. Checked
    /// against the discipline (see [`Violation`]) when the table is live.
    ///
    /// # Panics
    /// When `pa` is not 8-byte aligned or not in RAM.
    #[track_caller]
    pub fn write_desc(&self, pa: u64, value: u64) {
        let mut guard = self.lock();
        let state = &mut *guard;
        assert!(pa.is_multiple_of(8), "sim: write_desc at {pa:#x}, which is not 8-byte aligned");
        state.ram.check(pa, "write_desc");
        let old = state.ram.peek(pa).unwrap_or(0);
        state.tables.write(&mut state.ram, pa, value, &mut state.log.violations);
        state.log.event(Event::WriteDesc { pa, old, new: value });
    }

    /// Declares that `root` is from now on the (first) root table of a translation. Its pages, and all that
    /// they link, become live tables; its VMID (or EL2) stands for them, as [`Sim::set_stage2`] declares.
    ///
    /// # Panics
    /// When the input address size is not supported.
    #[track_caller]
    pub fn table_root(&self, root: u64, kind: TableKind) {
        let mut guard = self.lock();
        let state = &mut *guard;
        let space = kind.space(root);
        state.stand_for(space.regime, Some(space));
        state.tables.set_root(&state.ram, &space, &mut state.log.violations);
        state.log.event(Event::TableRoot { pa: root, kind });
    }

    /// Declares that no CPU will load `root` any more. Its tables may be given back in any order once the
    /// regime has been invalidated. Entries of its VMID are stale from now on.
    pub fn retire_root(&self, root: u64) {
        let mut guard = self.lock();
        let state = &mut *guard;
        state.tables.retire_root(&state.ram, root);
        let gone: Vec<Regime> =
            state.current.iter().filter(|(_, space)| space.root == root).map(|(regime, _)| *regime).collect();
        gone.into_iter().for_each(|regime| state.stand_for(regime, None));
        state.log.event(Event::RetireRoot { pa: root });
    }

    /// Gives a table page back. It may be linked nowhere, and TLBs must have forgotten it. Of a root that
    /// was not retired before, this retires the tree.
    pub fn free_table(&self, table: u64) {
        let mut guard = self.lock();
        let state = &mut *guard;
        state.tables.free(&state.ram, table, &mut state.log.violations);
        state.log.event(Event::FreeTable { pa: table });
    }

    /// Invalidates a range of the stage-2 translations of one VMID: DSB ISHST; TLBI IPAS2E1IS for each page
    /// of the range; DSB ISH; TLBI VMALLE1IS; DSB ISH; ISB, all under that VMID. Entries that cover more
    /// than the range go as well.
    ///
    /// # Panics
    /// When there is no such CPU.
    #[track_caller]
    pub fn tlbi_stage2_ipa(&self, cpu: usize, vmid: u16, ipa: u64, bytes: u64) {
        let scope = range(Regime::Stage2 { vmid }, ipa, bytes);
        self.lock().invalidate(cpu, &scope, Event::TlbiStage2Ipa { cpu, vmid, ipa, bytes });
    }

    /// Invalidates all translations of one VMID (TLBI VMALLS12E1IS, with its barriers).
    ///
    /// # Panics
    /// When there is no such CPU.
    #[track_caller]
    pub fn tlbi_stage2_vmid(&self, cpu: usize, vmid: u16) {
        let scope = Scope::Regime(Regime::Stage2 { vmid });
        self.lock().invalidate(cpu, &scope, Event::TlbiStage2Vmid { cpu, vmid });
    }

    /// Invalidates all translations of every VMID (TLBI ALLE1IS, with its barriers); not those of EL2.
    ///
    /// # Panics
    /// When there is no such CPU.
    #[track_caller]
    pub fn tlbi_all(&self, cpu: usize) {
        self.lock().invalidate(cpu, &Scope::AllStage2, Event::TlbiAll { cpu });
    }

    /// Invalidates a range of EL2's own translations (TLBI VAE2IS for each page, with its barriers).
    ///
    /// # Panics
    /// When there is no such CPU.
    #[track_caller]
    pub fn tlbi_hyp_va(&self, cpu: usize, va: u64, bytes: u64) {
        let scope = range(Regime::El2, va, bytes);
        self.lock().invalidate(cpu, &scope, Event::TlbiHypVa { cpu, va, bytes });
    }

    /// Invalidates all of EL2's own translations (TLBI ALLE2IS, with its barriers).
    ///
    /// # Panics
    /// When there is no such CPU.
    #[track_caller]
    pub fn tlbi_hyp_all(&self, cpu: usize) {
        self.lock().invalidate(cpu, &Scope::Regime(Regime::El2), Event::TlbiHypAll { cpu });
    }

    /// Makes earlier descriptor stores visible to all table walks (DSB ISHST, and an ISB).
    pub fn dsb_ishst(&self) {
        let mut state = self.lock();
        state.tables.barrier();
        state.log.event(Event::DsbIshst);
    }

    /// Tells whether something was taken away, a translation or a table, that TLBs may still hold: an invalidation is
    /// missing, or reached less.
    #[must_use]
    pub fn is_anything_pending(&self) -> bool {
        self.lock().tables.is_anything_pending()
    }

    /// Returns the live descriptors written since the last barrier (a TLB operation includes one). When a
    /// call returns there must be none, or a walk may still fault where it should not.
    #[must_use]
    pub fn unordered_writes(&self) -> Vec<u64> {
        self.lock().tables.unordered().to_vec()
    }

    /// Returns every breach of discipline so far, oldest first.
    #[must_use]
    pub fn violations(&self) -> Vec<Violation> {
        self.lock().log.violations.clone()
    }

    /// Returns the last events, oldest first; the ring holds 4096.
    #[must_use]
    pub fn events(&self) -> Vec<Event> {
        self.lock().log.events()
    }

    /// Empties the ring of events; violations stay.
    pub fn clear(&self) {
        self.lock().log.clear();
    }

    /// Tells whether walks may reach the page that `pa` is in as a table: it is linked, or was unlinked
    /// without the invalidation that makes TLBs forget it.
    #[must_use]
    pub fn is_table(&self, pa: u64) -> bool {
        self.lock().tables.is_table(page_of(pa))
    }

    /// Tells whose translation the live table that `pa` is in is part of: whoever writes to it must have that
    /// owner's leave.
    #[must_use]
    pub fn table_regime(&self, pa: u64) -> Option<Regime> {
        self.lock().tables.regime(page_of(pa))
    }

    /// Returns the leaf that a word is as a descriptor at `pa`, which is in a live table, if it is one there.
    #[must_use]
    pub fn leaf_at(&self, pa: u64, word: u64) -> Option<Leaf> {
        self.lock().tables.leaf(pa, word)
    }

    /// Returns the bytes that one descriptor of a level covers: 512 GiB, 1 GiB, 2 MiB, 4 KiB.
    ///
    /// # Panics
    /// When the level is above 3.
    #[must_use]
    pub fn level_size(level: u8) -> u64 {
        assert!(level <= 3, "sim: there is no level {level}");
        span(level)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Stage2;
    use crate::pending::Range;
    use crate::testing::{RAM, RW, block, machine};

    const VM: Stage2 = Stage2 { vmid: 7, root: RAM, ipa_bits: 39 };
    const KIND: TableKind = TableKind::Stage2 { vmid: 7, ipa_bits: 39 };

    fn mapped() -> Sim {
        let sim = machine();
        sim.zero_page(RAM);
        sim.table_root(RAM, KIND);
        sim.write_desc(RAM, block(RAM, RW));
        sim
    }

    #[test]
    fn invalidation_reaches_every_cpu() {
        let sim = mapped();
        sim.speculate(0, VM);
        sim.speculate(1, VM);
        sim.write_desc(RAM, 0);
        assert_eq!(sim.stale_entries(None).len(), 2);
        sim.tlbi_stage2_ipa(1, 7, 0, 1);
        assert_eq!(sim.stale_entries(None), []);
    }

    #[test]
    fn descriptor_write_is_unordered_until_a_barrier() {
        let sim = mapped();
        assert_eq!(sim.unordered_writes(), [RAM]);
        sim.dsb_ishst();
        assert!(sim.unordered_writes().is_empty());
        sim.write_desc(RAM, 0);
        assert_eq!(sim.unordered_writes(), [RAM]);
        sim.tlbi_all(0);
        assert!(sim.unordered_writes().is_empty());
    }

    #[test]
    fn events_tell_what_was_done_in_order() {
        let sim = mapped();
        sim.clear();
        sim.write_desc(RAM, 0);
        sim.tlbi_stage2_ipa(0, 7, 0, 4096);
        sim.tlbi_stage2_vmid(1, 7);
        sim.tlbi_all(0);
        sim.tlbi_hyp_va(0, 4096, 1);
        sim.tlbi_hyp_all(1);
        sim.dsb_ishst();
        sim.retire_root(RAM);
        sim.free_table(RAM);
        assert_eq!(
            sim.events(),
            [
                Event::WriteDesc { pa: RAM, old: block(RAM, RW), new: 0 },
                Event::TlbiStage2Ipa { cpu: 0, vmid: 7, ipa: 0, bytes: 4096 },
                Event::TlbiStage2Vmid { cpu: 1, vmid: 7 },
                Event::TlbiAll { cpu: 0 },
                Event::TlbiHypVa { cpu: 0, va: 4096, bytes: 1 },
                Event::TlbiHypAll { cpu: 1 },
                Event::DsbIshst,
                Event::RetireRoot { pa: RAM },
                Event::FreeTable { pa: RAM },
            ]
        );
        sim.table_root(RAM, KIND);
        assert_eq!(sim.events().last(), Some(&Event::TableRoot { pa: RAM, kind: KIND }));
    }

    #[test]
    fn a_live_table_is_told_by_whose_it_is() {
        let sim = mapped();
        assert_eq!(sim.table_regime(RAM + 8), Some(Regime::Stage2 { vmid: 7 }));
        assert_eq!(sim.table_regime(RAM + 0x1000), None);
        sim.retire_root(RAM);
        assert_eq!(sim.table_regime(RAM), None);
    }

    #[test]
    fn range_is_widened_to_whole_pages() {
        let range = |first, bytes| range(Regime::El2, first, bytes).range_in(Regime::El2);
        assert_eq!(range(0x1fff, 2), Some(Range { start: 0x1000, end: 0x3000 }));
        assert_eq!(range(0x1000, 0x1000), Some(Range { start: 0x1000, end: 0x2000 }));
        assert_eq!(range(u64::MAX - 0xfff, 0x1000), Some(Range { start: u64::MAX - 0xfff, end: u64::MAX }));
    }

    #[test]
    #[should_panic(expected = "there is no CPU 2")]
    fn invalidation_by_a_cpu_that_does_not_exist_is_a_bug_of_the_caller() {
        machine().tlbi_all(2);
    }

    #[test]
    #[should_panic(expected = "write_desc at 0x40000004, which is not 8-byte aligned")]
    fn unaligned_descriptor_is_a_bug_of_the_caller() {
        machine().write_desc(RAM + 4, 0);
    }

    #[test]
    fn level_sizes_are_public() {
        assert_eq!([0, 1, 2, 3].map(Sim::level_size), [1 << 39, 1 << 30, 1 << 21, 1 << 12]);
    }
}
