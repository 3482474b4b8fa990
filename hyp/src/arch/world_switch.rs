//! The world switch: putting a vCPU on this CPU in place of the host, running it, and putting the host back.
//!
//! Everything here works on one CPU, on a [`Context`] that this CPU has claimed, so no lock is needed. It
//! upholds I10: what a guest can reach is either switched here or trapped by [`super::traps`]. [`load`] and
//! [`unload`] move what is dear; between them, [`run`] enters and leaves the guest with its general registers
//! only, so that a guest call that EL2 answers costs little.
//!
//! Stage-1 walks are held off while the registers of two owners are mixed (TCR_EL1.EPD0 and EPD1 with the MMU
//! on): some cores walk speculatively at any time, and would keep a translation of one owner's tables under
//! the other's VMID (Linux: `ARM64_WORKAROUND_SPECULATIVE_AT`). It is cheap, so every core does it.
//!
//! Branch history (Spectre-BHB): EL2 does not clear it on entry from a guest. Deed's threat model leaves side
//! channels out; the loop of some 80 instructions that Linux runs on each exit would double the cost of a
//! guest call and close one channel of many. The barrier behind each ERET is there.

use super::features::Features;
use super::host::vttbr;
use super::instructions::{dsb_ish, isb, translate_el1_read};
use super::layout;
use super::panic::PANICKING;
use super::registers::{
    HCRX_EL2, HDFGRTR_EL2, HDFGRTR2_EL2, HDFGWTR_EL2, HDFGWTR2_EL2, HFGITR_EL2, HFGITR2_EL2, HFGRTR_EL2,
    HFGRTR2_EL2, HFGWTR_EL2, HFGWTR2_EL2, HPFAR_EL2, ICC_SRE_EL2, ICH_HCR_EL2, MPAM2_EL2, PMCR_EL0,
    PMSELR_EL0, PMUSERENR_EL0, TPIDR2_EL0, TRFCR_EL1, VDISR_EL2, VSESR_EL2,
};
use super::traps::{self, hcr};
use crate::machine::Stage2Id;
use crate::vm::context::{Context, El1, Fp, HostTraps, Keys, SCTLR_RESET, Trap};
use aarch64_cpu::registers::{
    CNTHCTL_EL2, CPTR_EL2, ELR_EL2, ESR_EL2, FAR_EL2, HCR_EL2, MDCR_EL2, Readable, SCTLR_EL1, SPSR_EL2,
    TCR_EL1, VBAR_EL2, VTTBR_EL2, Writeable,
};
use core::arch::global_asm;
use core::ffi::c_void;
use core::mem::offset_of;
use core::sync::atomic::{AtomicU32, Ordering};

/// What [`enter_guest`] returns.
const EXIT_SYNC: u64 = 0;
const EXIT_IRQ: u64 = 1;
const EXIT_SERROR: u64 = 2;

macro_rules! adjacent {
    ($($first:ident $second:ident,)*) => {
        $(const _: () = assert!(offset_of!(El1, $second) == offset_of!(El1, $first) + 8);)*
    };
}

// The pairs that world_switch.S moves with one instruction.
adjacent! {
    sp_el0 sp_el1,
    elr_el1 spsr_el1,
    sctlr_el1 tcr_el1,
    ttbr0_el1 ttbr1_el1,
    mair_el1 amair_el1,
    vbar_el1 contextidr_el1,
    esr_el1 far_el1,
    afsr0_el1 afsr1_el1,
    cpacr_el1 par_el1,
    tpidr_el0 tpidrro_el0,
    tpidr_el1 csselr_el1,
    cntkctl_el1 cntv_cval_el0,
    cntv_ctl_el0 mdscr_el1,
}
const _: () = assert!(offset_of!(Context, pstate) == offset_of!(Context, pc) + 8);
const _: () = assert!(offset_of!(Fp, fpsr) == offset_of!(Fp, fpcr) + 8);
const _: () = assert!(offset_of!(Context, fp) % 16 == 0 && size_of::<Keys>() == 80);
// The immediate offsets of LDP and STP reach 504 bytes.
const _: () = assert!(offset_of!(Context, pc) <= 504 && offset_of!(El1, cntv_ctl_el0) <= 504);

global_asm!(
    ".equ CONTEXT_X, {context_x}",
    ".equ CONTEXT_PC, {context_pc}",
    ".equ EL1_SP_EL0, {sp_el0}",
    ".equ EL1_ELR_EL1, {elr_el1}",
    ".equ EL1_SCTLR_EL1, {sctlr_el1}",
    ".equ EL1_TTBR0_EL1, {ttbr0_el1}",
    ".equ EL1_MAIR_EL1, {mair_el1}",
    ".equ EL1_VBAR_EL1, {vbar_el1}",
    ".equ EL1_ESR_EL1, {esr_el1}",
    ".equ EL1_AFSR0_EL1, {afsr0_el1}",
    ".equ EL1_CPACR_EL1, {cpacr_el1}",
    ".equ EL1_TPIDR_EL0, {tpidr_el0}",
    ".equ EL1_TPIDR_EL1, {tpidr_el1}",
    ".equ EL1_CNTKCTL_EL1, {cntkctl_el1}",
    ".equ EL1_CNTV_CTL_EL0, {cntv_ctl_el0}",
    ".equ EL1_VMPIDR_EL2, {vmpidr_el2}",
    ".equ FP_V, {fp_v}",
    ".equ FP_FPCR, {fp_fpcr}",
    ".equ STACK_SPAN, {stack_span}",
    ".equ GUEST_STACKS_OFFSET, {guest_stacks_offset}",
    ".equ EXIT_SYNC, {exit_sync}",
    ".equ EXIT_IRQ, {exit_irq}",
    ".equ EXIT_SERROR, {exit_serror}",
    include_str!("world_switch.S"),
    context_x = const offset_of!(Context, x),
    context_pc = const offset_of!(Context, pc),
    sp_el0 = const offset_of!(El1, sp_el0),
    elr_el1 = const offset_of!(El1, elr_el1),
    sctlr_el1 = const offset_of!(El1, sctlr_el1),
    ttbr0_el1 = const offset_of!(El1, ttbr0_el1),
    mair_el1 = const offset_of!(El1, mair_el1),
    vbar_el1 = const offset_of!(El1, vbar_el1),
    esr_el1 = const offset_of!(El1, esr_el1),
    afsr0_el1 = const offset_of!(El1, afsr0_el1),
    cpacr_el1 = const offset_of!(El1, cpacr_el1),
    tpidr_el0 = const offset_of!(El1, tpidr_el0),
    tpidr_el1 = const offset_of!(El1, tpidr_el1),
    cntkctl_el1 = const offset_of!(El1, cntkctl_el1),
    cntv_ctl_el0 = const offset_of!(El1, cntv_ctl_el0),
    vmpidr_el2 = const offset_of!(El1, vmpidr_el2),
    fp_v = const offset_of!(Fp, v),
    fp_fpcr = const offset_of!(Fp, fpcr),
    exit_sync = const EXIT_SYNC,
    exit_irq = const EXIT_IRQ,
    exit_serror = const EXIT_SERROR,
    panicking = sym PANICKING,
    stacks = sym layout::STACKS,
    stack_span = const size_of::<layout::Stack>(),
    guest_stacks_offset = const layout::GUEST_STACKS * size_of::<layout::Stack>(),
);

unsafe extern "C" {
    // See world_switch.S. Each reads or writes exactly the structure that it is given.
    safe fn save_el1(el1: &mut El1);
    safe fn save_fp(fp: &mut Fp);
    safe fn save_keys(keys: &mut Keys);
    // Loading changes what EL1 is, which EL2's own code does not depend on.
    safe fn load_el1(el1: &El1);
    safe fn load_fp(fp: &Fp);
    safe fn load_keys(keys: &Keys);
    /// # Safety
    /// The guest of `context` is loaded on this CPU.
    fn enter_guest(context: &mut Context) -> u64;
    /// # Safety
    /// This CPU is not on its guest stack, and `function` may be called with `argument`.
    fn call_on_guest_stack(argument: *mut c_void, function: unsafe extern "C" fn(*mut c_void));
    safe static guest_vectors: [u8; 0];
    // See vectors.S.
    safe static host_vectors: [u8; 0];
}

/// Features that decide what is switched, as bits.
mod feature {
    /// The bits are valid.
    pub(super) const PROBED: u32 = 1 << 0;
    pub(super) const PAUTH: u32 = 1 << 1;
    pub(super) const PMU: u32 = 1 << 2;
    pub(super) const GIC: u32 = 1 << 3;
    pub(super) const RAS: u32 = 1 << 4;
    pub(super) const HCX: u32 = 1 << 5;
    pub(super) const FGT: u32 = 1 << 6;
    pub(super) const FGT2: u32 = 1 << 7;
    pub(super) const MPAM: u32 = 1 << 8;
    pub(super) const SME: u32 = 1 << 9;
    pub(super) const TRACE_FILTER: u32 = 1 << 10;
    /// Those that few CPUs have and no budget counts.
    pub(super) const RARE: u32 = HCX | FGT | FGT2 | MPAM | TRACE_FILTER;
}

/// What the first CPU that asked has; Deed runs on CPUs that are alike.
#[inline]
fn features() -> u32 {
    static FEATURES: AtomicU32 = AtomicU32::new(0);
    // Relaxed: every CPU that finds 0 computes the same value.
    let known = FEATURES.load(Ordering::Relaxed);
    if known & feature::PROBED != 0 {
        return known;
    }
    let probed = probe();
    FEATURES.store(probed, Ordering::Relaxed);
    probed
}

#[cold]
fn probe() -> u32 {
    let features = Features::probe();
    let bits = [
        (true, feature::PROBED),
        (features.pauth, feature::PAUTH),
        (features.pmu, feature::PMU),
        (features.gic, feature::GIC),
        (features.ras, feature::RAS),
        (features.hcx, feature::HCX),
        (features.fgt, feature::FGT),
        (features.fgt2, feature::FGT2),
        (features.trace_filter, feature::TRACE_FILTER),
        (features.mpam, feature::MPAM),
        (features.sme, feature::SME),
    ];
    bits.into_iter().filter(|(has, _)| *has).fold(0, |all, (_, bit)| all | bit)
}

/// Holds stage-1 walks off, until [`release_walks`].
#[inline]
fn hold_walks() {
    // Walks that are under way end with the registers that they began with. So does the maintenance that the
    // owner has begun and not waited for: it may go on on another CPU, where its own DSB would not wait.
    dsb_ish();
    TCR_EL1.write(TCR_EL1::EPD0::DisableTTBR0Walks + TCR_EL1::EPD1::DisableTTBR1Walks);
    // EPD means something only with the MMU on, and must be seen before the MMU is.
    isb();
    SCTLR_EL1.set(SCTLR_RESET | SCTLR_EL1::M::Enable.value);
    isb();
}

/// Lets stage-1 walks begin, with everything else in place.
#[inline]
fn release_walks(el1: &El1) {
    isb();
    SCTLR_EL1.set(el1.sctlr_el1);
    isb();
    TCR_EL1.set(el1.tcr_el1);
    // The ERET that follows synchronises.
}

/// Does something that needs stage-1 walks held off, with whatever EL1 registers are in the CPU.
pub(super) fn without_walks(operation: impl FnOnce()) {
    let (sctlr, tcr) = (SCTLR_EL1.get(), TCR_EL1.get());
    hold_walks();
    operation();
    isb();
    SCTLR_EL1.set(sctlr);
    isb();
    TCR_EL1.set(tcr);
}

/// Calls `work` on this CPU's guest stack, which this CPU is not on.
#[inline]
pub(super) fn on_guest_stack<F: FnMut()>(mut work: F) {
    /// # Safety
    /// `work` points to an `F` that nobody else uses.
    unsafe extern "C" fn call<F: FnMut()>(work: *mut c_void) {
        // SAFETY: as said.
        unsafe { (*work.cast::<F>())() };
    }
    // SAFETY: the core does not nest this, and `work` is an `F`, unused until the call returns.
    unsafe { call_on_guest_stack((&raw mut work).cast(), call::<F>) };
}

/// Puts a vCPU on this CPU: the host's registers go to `context.host`, the guest's come from `context`.
pub(super) fn load(id: Stage2Id, context: &mut Context) {
    let features = features();
    let host = &mut context.host;
    save_el1(&mut host.el1);
    save_fp(&mut host.fp);
    let traps = &mut host.traps;
    traps.elr_el2 = ELR_EL2.get();
    traps.spsr_el2 = SPSR_EL2.get();
    traps.hcr_el2 = host_hcr(HCR_EL2.get());
    traps.vttbr_el2 = VTTBR_EL2.get();
    traps.mdcr_el2 = MDCR_EL2.get();

    hold_walks();
    VTTBR_EL2.set(vttbr(id));
    HCR_EL2.set(traps::guest_hcr(traps.hcr_el2));
    CPTR_EL2.set(traps::GUEST_CPTR);
    MDCR_EL2.set(traps::guest_mdcr(traps.mdcr_el2));
    CNTHCTL_EL2.set(traps::GUEST_CNTHCTL);
    VBAR_EL2.set((&raw const guest_vectors).addr() as u64);
    if features & feature::PMU != 0 {
        traps.pmcr_el0 = PMCR_EL0.get();
        PMCR_EL0.set(traps.pmcr_el0 & !traps::PMCR_ENABLE);
        // Open to EL0, so that an access traps to EL2 (MDCR_EL2.TPM) and not to EL1 by what the host chose.
        traps.pmuserenr_el0 = PMUSERENR_EL0.get();
        traps.pmselr_el0 = PMSELR_EL0.get();
        PMUSERENR_EL0.set(traps::PMUSERENR_ALL);
        PMSELR_EL0.set(0);
    }
    if features & feature::GIC != 0 {
        ICH_HCR_EL2.set(traps::GUEST_ICH_HCR);
        ICC_SRE_EL2.set(traps::GUEST_ICC_SRE);
    }
    if features & feature::RAS != 0 {
        VDISR_EL2.set(context.el1.vdisr_el2);
    }
    if features & feature::RARE != 0 {
        load_rare(features, traps);
    }
    if features & feature::SME != 0 {
        host.el1.tpidr2_el0 = TPIDR2_EL0.get();
        TPIDR2_EL0.set(context.el1.tpidr2_el0);
    }
    load_el1(&context.el1);
    load_fp(&context.fp);
    if features & feature::PAUTH != 0 {
        save_keys(&mut host.keys);
        load_keys(&context.keys);
    }
    release_walks(&context.el1);
}

/// Puts the host back: the guest's registers go to `context`, the host's come from `context.host`.
pub(super) fn unload(context: &mut Context) {
    let features = features();
    save_el1(&mut context.el1);
    save_fp(&mut context.fp);
    let host = &context.host;
    let traps = &host.traps;

    hold_walks();
    VTTBR_EL2.set(traps.vttbr_el2);
    HCR_EL2.set(traps.hcr_el2);
    CPTR_EL2.set(traps::HOST_CPTR);
    MDCR_EL2.set(traps.mdcr_el2);
    CNTHCTL_EL2.set(traps::HOST_CNTHCTL);
    VBAR_EL2.set((&raw const host_vectors).addr() as u64);
    if features & feature::PMU != 0 {
        PMCR_EL0.set(traps.pmcr_el0);
        PMUSERENR_EL0.set(traps.pmuserenr_el0);
        PMSELR_EL0.set(traps.pmselr_el0);
    }
    if features & feature::GIC != 0 {
        ICH_HCR_EL2.set(0);
        ICC_SRE_EL2.set(traps::HOST_ICC_SRE);
    }
    if features & feature::RAS != 0 {
        context.el1.vdisr_el2 = VDISR_EL2.get();
        VDISR_EL2.set(0);
    }
    if features & feature::RARE != 0 {
        unload_rare(features, traps);
    }
    if features & feature::SME != 0 {
        context.el1.tpidr2_el0 = TPIDR2_EL0.get();
        TPIDR2_EL0.set(host.el1.tpidr2_el0);
    }
    if features & feature::PAUTH != 0 {
        save_keys(&mut context.keys);
        load_keys(&host.keys);
    }
    load_el1(&host.el1);
    load_fp(&host.fp);
    release_walks(&host.el1);
    ELR_EL2.set(traps.elr_el2);
    SPSR_EL2.set(traps.spsr_el2);
}

#[cold]
fn load_rare(features: u32, traps: &mut HostTraps) {
    if features & feature::HCX != 0 {
        traps.hcrx_el2 = HCRX_EL2.get();
        HCRX_EL2.set(0);
    }
    if features & feature::MPAM != 0 {
        traps.mpam2_el2 = MPAM2_EL2.get();
        MPAM2_EL2.set(traps::GUEST_MPAM2);
    }
    if features & feature::TRACE_FILTER != 0 {
        // Guests are not traced, whatever the host traces of itself.
        traps.trfcr_el1 = TRFCR_EL1.get();
        TRFCR_EL1.set(0);
    }
    if features & feature::FGT != 0 {
        let [a, b, c, d, e, ..] = &mut traps.fine_grained;
        (*a, *b, *c) = (HFGRTR_EL2.get(), HFGWTR_EL2.get(), HFGITR_EL2.get());
        (*d, *e) = (HDFGRTR_EL2.get(), HDFGWTR_EL2.get());
        set_fine_grained(&[0; 5]);
    }
    if features & feature::FGT2 != 0 {
        let [.., a, b, c, d, e] = &mut traps.fine_grained;
        (*a, *b, *c) = (HFGRTR2_EL2.get(), HFGWTR2_EL2.get(), HFGITR2_EL2.get());
        (*d, *e) = (HDFGRTR2_EL2.get(), HDFGWTR2_EL2.get());
        set_fine_grained2(&[0; 5]);
    }
}

#[cold]
fn unload_rare(features: u32, traps: &HostTraps) {
    if features & feature::HCX != 0 {
        HCRX_EL2.set(traps.hcrx_el2);
    }
    if features & feature::MPAM != 0 {
        MPAM2_EL2.set(traps.mpam2_el2);
    }
    if features & feature::TRACE_FILTER != 0 {
        TRFCR_EL1.set(traps.trfcr_el1);
    }
    let [a, b, c, d, e, f, g, h, i, j] = traps.fine_grained;
    if features & feature::FGT != 0 {
        set_fine_grained(&[a, b, c, d, e]);
    }
    if features & feature::FGT2 != 0 {
        set_fine_grained2(&[f, g, h, i, j]);
    }
}

fn set_fine_grained(values: &[u64; 5]) {
    let [reads, writes, instructions, debug_reads, debug_writes] = *values;
    HFGRTR_EL2.set(reads);
    HFGWTR_EL2.set(writes);
    HFGITR_EL2.set(instructions);
    HDFGRTR_EL2.set(debug_reads);
    HDFGWTR_EL2.set(debug_writes);
}

fn set_fine_grained2(values: &[u64; 5]) {
    let [reads, writes, instructions, debug_reads, debug_writes] = *values;
    HFGRTR2_EL2.set(reads);
    HFGWTR2_EL2.set(writes);
    HFGITR2_EL2.set(instructions);
    HDFGRTR2_EL2.set(debug_reads);
    HDFGWTR2_EL2.set(debug_writes);
}

/// Runs the vCPU that is loaded, under the stage-2 that [`load`] was given, until it traps.
#[inline]
pub(super) fn run(_id: Stage2Id, context: &mut Context) -> Trap {
    // SAFETY: the core calls `run` between `load` and `unload` of this context on this CPU only.
    match unsafe { enter_guest(context) } {
        EXIT_SYNC => synchronous(ESR_EL2.get()),
        EXIT_IRQ => Trap::Irq,
        _ => Trap::SError { esr: ESR_EL2.get() },
    }
}

#[inline]
fn synchronous(esr: u64) -> Trap {
    const EC_SHIFT: u32 = 26;
    const EC_MASK: u64 = 0x3f;
    const INSTRUCTION_ABORT: u64 = 0x20;
    const DATA_ABORT: u64 = 0x24;
    match esr >> EC_SHIFT & EC_MASK {
        INSTRUCTION_ABORT | DATA_ABORT => abort(esr),
        _ => Trap::Sync { esr, far: 0, hpfar: 0 },
    }
}

/// Finds the addresses of an abort. HPFAR_EL2 is valid for all stage-2 faults but permission faults that are
/// not on a stage-1 walk (Arm ARM, HPFAR_EL2): there the address is translated again.
fn abort(esr: u64) -> Trap {
    const S1PTW: u64 = 1 << 7;
    const FAR_NOT_VALID: u64 = 1 << 10;
    const EXTERNAL: u64 = 0b01_0000;
    const FAULT_TYPE: u64 = 0b11_1100;
    const PERMISSION: u64 = 0b00_1100;
    const PAR_FAILED: u64 = 1 << 0;
    const PAR_ADDRESS: u64 = 0x0000_ffff_ffff_f000;
    let external = esr & EXTERNAL != 0;
    let far = if external && esr & FAR_NOT_VALID != 0 { 0 } else { FAR_EL2.get() };
    let hpfar = match esr & FAULT_TYPE {
        _ if external => 0,
        PERMISSION if esr & S1PTW == 0 => {
            let par = translate_el1_read(far);
            if par & PAR_FAILED != 0 {
                return Trap::Retry;
            }
            // HPFAR_EL2 holds bits 51:12 of the address in bits 43:4.
            (par & PAR_ADDRESS) >> 8
        }
        _ => HPFAR_EL2.get(),
    };
    Trap::Sync { esr, far, hpfar }
}

/// HCR_EL2 of the host, from what is in the register: SErrors are routed to EL2 only for as long as one is
/// pending for the host (see [`pend_serror`]).
#[inline]
fn host_hcr(value: u64) -> u64 {
    if value & hcr::VSE == 0 { value & !hcr::AMO } else { value }
}

/// Makes an SError that was taken from a guest pending for the host, as a virtual one: it arrives when the
/// host unmasks SErrors. Call after [`unload`].
#[cold]
pub(super) fn pend_serror(esr: u64) {
    /// IDS and ISS, which the host finds in its ESR_EL1.
    const SYNDROME: u64 = (1 << 25) - 1;
    if features() & feature::RAS != 0 {
        VSESR_EL2.set(esr & SYNDROME);
    }
    HCR_EL2.set(HCR_EL2.get() | hcr::VSE | hcr::AMO);
}
