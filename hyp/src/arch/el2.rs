//! The machine as the core sees it, when it is real: [`Machine`] for EL2.
//!
//! A handle without state. Descriptors and records are reached through EL2's identity map, which covers all
//! that the hypervisor owns; any other page through the fixmap.

use super::host::vttbr;
use super::instructions as i;
use super::registers::ID_AA64ISAR2_EL1;
use super::{cache, fixmap, world_switch};
use crate::addr::{Gfn, Pages, Pfn, PhysAddr, Vpn};
use crate::machine::{IdRegister, Machine, Stage2Id};
use crate::vm::context::{Context, Trap};
use aarch64_cpu::registers::{
    ID_AA64ISAR0_EL1, ID_AA64ISAR1_EL1, ID_AA64MMFR0_EL1, ID_AA64MMFR1_EL1, ID_AA64MMFR2_EL1,
    ID_AA64PFR0_EL1, ID_AA64PFR1_EL1, Readable, VTTBR_EL2, Writeable,
};
use abi::host::EventKind;
use core::ptr::NonNull;

/// Pages up to which a range is invalidated one by one; a larger one takes the whole VMID with it.
const MOST_SINGLE_INVALIDATIONS: u64 = 64;

/// The machine under EL2.
#[derive(Clone, Copy, Debug)]
pub struct El2;

/// The last page-table events, for TEST_EVENTS. Its lock is a leaf.
#[cfg(feature = "test-calls")]
static EVENTS: spin::Mutex<crate::events::Ring> = spin::Mutex::new(crate::events::Ring::new());

/// Remembers an event in test builds; in others there is nothing to remember it in.
#[cfg_attr(feature = "test-calls", inline(never))]
fn note(_kind: EventKind, _vmid: u16, _address: u64, _old: u64, _new: u64) {
    #[cfg(feature = "test-calls")]
    EVENTS.lock().note(_kind, _vmid.into(), _address, _old, _new);
}

/// Runs maintenance under a VMID, which is loaded for it if it is not already.
///
/// Meanwhile the registers of EL1 are those of another owner than the VMID. A core that walks speculatively
/// (the speculative-AT errata) would keep what it found under the wrong VMID, so stage-1 walks are held off.
fn under(id: Stage2Id, maintenance: impl FnOnce()) {
    let wanted = vttbr(id);
    let loaded = VTTBR_EL2.get();
    i::dsb_ish();
    if wanted == loaded {
        maintenance();
    } else {
        world_switch::without_walks(|| {
            VTTBR_EL2.set(wanted);
            i::isb();
            maintenance();
            VTTBR_EL2.set(loaded);
        });
    }
    i::isb();
}

impl Machine for El2 {
    #[inline]
    fn read_descriptor(&self, at: PhysAddr) -> u64 {
        let entry = at.as_u64() as *const u64;
        // SAFETY: the core passes addresses of entries of tables, aligned, in pages that the hypervisor owns
        // and EL2 maps one to one, and holds the lock of the table.
        unsafe { entry.read_volatile() }
    }

    #[inline]
    fn write_descriptor(&self, at: PhysAddr, value: u64) {
        if cfg!(feature = "test-calls") {
            let old = self.read_descriptor(at);
            if old != value {
                note(EventKind::Write, 0, at.as_u64(), old, value);
            }
        }
        let entry = at.as_u64() as *mut u64;
        // SAFETY: as in `read_descriptor`; no Rust reference to table memory exists.
        unsafe { entry.write_volatile(value) };
    }

    #[inline]
    fn publish(&self) {
        i::dsb_ishst();
        i::isb();
    }

    fn invalidate_stage2(&self, id: Stage2Id, pages: Pages<Gfn>) {
        under(id, || {
            if pages.count() > MOST_SINGLE_INVALIDATIONS {
                i::tlbi_vmalls12e1is();
            } else {
                for page in pages.iter() {
                    i::tlbi_ipas2e1is(page.as_u64());
                }
                i::dsb_ish();
                // Combined entries are not found by IPA.
                i::tlbi_vmalle1is();
            }
            i::dsb_ish();
        });
        note(EventKind::DropStage2, id.vmid, pages.start().base().as_u64(), pages.count(), 0);
    }

    fn retire_stage2(&self, id: Stage2Id) {
        note(EventKind::Retire, id.vmid, id.root.base().as_u64(), 0, 0);
        under(id, || {
            i::tlbi_vmalls12e1is();
            i::dsb_ish();
        });
    }

    fn invalidate_hyp(&self, pages: Pages<Vpn>) {
        note(EventKind::DropHyp, 0, pages.start().base().as_u64(), pages.count(), 0);
        i::dsb_ish();
        if pages.count() > MOST_SINGLE_INVALIDATIONS {
            i::tlbi_alle2is();
        } else {
            for page in pages.iter() {
                i::tlbi_vae2is(page.as_u64());
            }
        }
        i::dsb_ish();
        i::isb();
    }

    #[inline(never)]
    fn wipe(&self, page: Pfn) {
        note(EventKind::Wipe, 0, page.base().as_u64(), 1, 0);
        fixmap::with_page(page, |start| {
            if cfg!(feature = "no-wipe") {
                cache::clean_page(start);
            } else {
                // SAFETY: the slot maps the page read-write for this CPU; the core wipes only pages that
                // nobody can reach any more.
                unsafe { cache::wipe_page(start) };
            }
        });
    }

    fn clean(&self, page: Pfn) {
        fixmap::with_page(page, cache::clean_page);
    }

    fn needs_clean(&self) -> bool {
        const FWB_SHIFT: u32 = 40;
        ID_AA64MMFR2_EL1.get() >> FWB_SHIFT & 0xf == 0
    }

    fn invalidate_icache(&self) {
        i::dsb_ish();
        i::ic_ialluis();
        i::dsb_ish();
        i::isb();
    }

    fn on_guest_stack(&self, work: impl FnMut()) {
        world_switch::on_guest_stack(work);
    }

    fn forget_guest_stacks(&self) {
        // SAFETY: the core calls this when no CPU works on its guest stack, nor will.
        unsafe { super::layout::forget_guests() };
    }

    fn load(&self, id: Stage2Id, context: &mut Context) {
        world_switch::load(id, context);
    }

    fn run(&self, id: Stage2Id, context: &mut Context) -> Trap {
        world_switch::run(id, context)
    }

    fn unload(&self, context: &mut Context) {
        world_switch::unload(context);
    }

    fn pend_serror(&self, esr: u64) {
        world_switch::pend_serror(esr);
    }

    fn id_register(&self, register: IdRegister) -> u64 {
        match register {
            IdRegister::Pfr0 => ID_AA64PFR0_EL1.get(),
            IdRegister::Pfr1 => ID_AA64PFR1_EL1.get(),
            IdRegister::Isar0 => ID_AA64ISAR0_EL1.get(),
            IdRegister::Isar1 => ID_AA64ISAR1_EL1.get(),
            IdRegister::Isar2 => ID_AA64ISAR2_EL1.get(),
            IdRegister::Mmfr0 => ID_AA64MMFR0_EL1.get(),
            IdRegister::Mmfr1 => ID_AA64MMFR1_EL1.get(),
            IdRegister::Mmfr2 => ID_AA64MMFR2_EL1.get(),
        }
    }

    fn forget_vcpu(&self, id: Stage2Id) {
        under(id, || {
            i::tlbi_vmalle1();
            i::ic_iallu();
            i::dsb_nsh();
        });
    }

    #[cfg(feature = "test-calls")]
    fn event(&self, from: u64) -> Option<crate::events::Event> {
        EVENTS.lock().first_from(from)
    }

    fn clean_record(&self, start: *const u8, bytes: usize) {
        cache::clean_and_invalidate(start.addr() as u64, bytes as u64);
    }

    #[cfg(feature = "oracle")]
    fn is_zeros(&self, page: Pfn) -> bool {
        fixmap::with_page(page, cache::is_zeros)
    }

    #[cfg(feature = "oracle")]
    fn is_alone(&self) -> bool {
        super::secondary::is_alone()
    }

    #[cfg(feature = "oracle")]
    fn now(&self) -> u64 {
        use aarch64_cpu::registers::{CNTFRQ_EL0, CNTPCT_EL0};
        const SECOND: u64 = 1_000_000_000;
        i::isb();
        let (ticks, frequency) = (CNTPCT_EL0.get(), CNTFRQ_EL0.get().max(1));
        ticks / frequency * SECOND + ticks % frequency * SECOND / frequency
    }

    fn record_memory(&self, pages: Pages<Pfn>) -> Option<NonNull<u8>> {
        NonNull::new(pages.start().base().as_u64() as *mut u8)
    }
}
