//! What the host's exceptions to EL2 mean: calls, aborts at stage 2, trapped registers. See vectors.S for the
//! way in and out. No value from the host makes any of this panic (invariant I8).

use super::features::Features;
use super::panic::{EMERGENCY_STACK, EMERGENCY_STACK_SIZE, FATAL, FatalFrame, PANICKING, report_fatal};
use super::registers::HPFAR_EL2;
use super::{boot, id_registers, layout, power, secondary, verdict, world_switch};
use crate::addr::Gfn;
use crate::call::host::HostReply;
use crate::exception::{self, Interrupted, Taken};
use crate::ownership::query::AbortAnswer;
use crate::psci::Answer;
use crate::smc;
use crate::vm::context::pstate;
use aarch64_cpu::registers::{
    ELR_EL1, ELR_EL2, ESR_EL1, FAR_EL1, FAR_EL2, Readable, SCTLR_EL1, SPSR_EL1, SPSR_EL2, TPIDR_EL2,
    VBAR_EL1, Writeable,
};
use abi::exit::Access;
use abi::host::{CALLS, DEED_UID, FIRST};
use abi::smccc::{self, FunctionId};
use core::arch::global_asm;
use core::mem::size_of;

/// x0 to x30 of the host. A call leaves x19 to x29 unset: the called functions keep them.
#[derive(Debug)]
#[repr(C, align(16))]
pub struct Frame {
    x: [u64; 31],
    _padding: u64,
}

const FRAME_SIZE: usize = size_of::<Frame>();
const _: () = assert!(FRAME_SIZE == 256 && size_of::<FatalFrame>() == 272);

const EC_SHIFT: u32 = 26;
const EC_SMC64: u64 = 0x17;
const EC_HVC64: u64 = 0x16;
const EC_SYSTEM_REGISTER: u64 = 0x18;
const EC_INSTRUCTION_ABORT_LOWER: u64 = 0x20;
const EC_DATA_ABORT_LOWER: u64 = 0x24;

global_asm!(
    ".equ FRAME_SIZE, {frame_size}",
    ".equ FATAL_FRAME_SIZE, {fatal_frame_size}",
    ".equ EMERGENCY_STACK_SIZE, {emergency_stack_size}",
    ".equ ESR_EC_SHIFT, {ec_shift}",
    ".equ EC_HVC64, {ec_hvc64}",
    ".equ EC_SMC64, {ec_smc64}",
    ".equ HOST_STACK_SPAN, {stack_span}",
    include_str!("vectors.S"),
    stack_span = const size_of::<layout::Stack>(),
    frame_size = const FRAME_SIZE,
    fatal_frame_size = const size_of::<FatalFrame>(),
    emergency_stack_size = const EMERGENCY_STACK_SIZE,
    ec_shift = const EC_SHIFT,
    ec_hvc64 = const EC_HVC64,
    ec_smc64 = const EC_SMC64,
    panicking = sym PANICKING,
    fatal = sym FATAL,
    emergency_stack = sym EMERGENCY_STACK,
    report_fatal = sym report_fatal,
    host_hvc = sym host_hvc,
    host_smc = sym host_smc,
    host_trap = sym host_trap,
    host_serror = sym host_serror,
    stacks = sym layout::STACKS,
);

unsafe extern "C" {
    /// EL2's vectors while the host runs (vectors.S).
    pub safe static host_vectors: [u8; 0];
}

/// Index of this CPU.
pub fn this_cpu() -> usize {
    TPIDR_EL2.get() as usize
}

/// The exception class. What stands above it in the syndrome is of no interest here.
fn class(esr: u64) -> u64 {
    esr >> EC_SHIFT & 0x3f
}

/// The 16-bit immediate of an HVC or SMC.
fn immediate(esr: u64) -> u16 {
    esr as u16
}

/// How many registers from x4 on a successful result of each call names. x0 to x3 are always written, the others only
/// if named: a refusal names none of them.
#[expect(
    clippy::indexing_slicing,
    reason = "evaluated by the compiler, which refuses an index out of bounds"
)]
const NAMED_BEYOND_X3: [u8; 256] = {
    let mut named = [0; 256];
    let mut index = 0;
    while index < CALLS.len() {
        let call = &CALLS[index];
        named[(call.number - FIRST) as usize] = call.results.len().saturating_sub(2) as u8;
        index += 1;
    }
    named
};

/// HVC from AArch64.
extern "C" fn host_hvc(frame: &mut Frame, esr: u64) {
    if immediate(esr) != 0 {
        return not_supported(frame);
    }
    let [x0, x1, x2, x3, x4, x5, x6, ..] = frame.x;
    // By reference: a result is ten words, and copying it would cost more than the entry.
    match &boot::hypervisor().host_call(this_cpu(), &[x0, x1, x2, x3, x4, x5, x6]) {
        HostReply::Pages(Ok(done)) => frame.answer(smccc::SUCCESS, [0, *done, 0]),
        HostReply::Pages(Err(refusal)) => {
            let [x2, x3] = refusal.words();
            frame.answer(smccc::SUCCESS, [abi::Error::from(*refusal).to_word(), x2, x3]);
        }
        HostReply::Values(result) => {
            let [x2, x3, others @ ..] = &result.values;
            frame.answer(smccc::SUCCESS, [result.outcome.map_or_else(abi::Error::to_word, |()| 0), *x2, *x3]);
            if result.outcome.is_ok() {
                frame.answer_more(x0, others);
            }
        }
        HostReply::NotSupported => match FunctionId::from_x0(x0).number() {
            smccc::VENDOR_HYP_UID => {
                let [x0, x1, x2, x3] = DEED_UID.map(u64::from);
                frame.answer(x0, [x1, x2, x3]);
            }
            _ => not_supported(frame),
        },
    }
}

impl Frame {
    /// Writes x0 and x1 to x3.
    fn answer(&mut self, status: u64, values: [u64; 3]) {
        let [x0, x1, x2, x3, ..] = &mut self.x;
        (*x0, [*x1, *x2, *x3]) = (status, values);
    }

    /// Writes those registers from x4 on that a successful result of this call names.
    #[inline(never)]
    fn answer_more(&mut self, call: u64, values: &[u64]) {
        let index = FunctionId::from_x0(call).number().wrapping_sub(FIRST);
        let named = NAMED_BEYOND_X3.get(index as usize).copied().unwrap_or(0);
        let [_, _, _, _, others @ ..] = &mut self.x;
        for (register, value) in others.iter_mut().zip(values).take(usize::from(named)) {
            *register = *value;
        }
    }
}

fn not_supported(frame: &mut Frame) {
    frame.answer(smccc::NOT_SUPPORTED, [0, 0, 0]);
}

/// SMC from AArch64. The preferred return address is that of the SMC: step over it.
extern "C" fn host_smc(frame: &mut Frame, esr: u64) {
    let [x0, x1, x2, x3, ..] = &mut frame.x;
    let value = match smc::answer([*x0, *x1, *x2, *x3], immediate(esr)) {
        Answer::Value(value) => value,
        Answer::Power(power) => secondary::host_power(power),
        Answer::Firmware => return relay(frame),
        Answer::End(end) => verdict::end_run(boot::hypervisor(), end),
    };
    (*x0, *x1, *x2, *x3) = (value, 0, 0, 0);
    skip_instruction();
}

/// An SMC of the host's that is the firmware's. Apart, so that the others need not keep registers for it.
#[inline(never)]
fn relay(frame: &mut Frame) {
    let [x0, x1, x2, x3, ..] = &mut frame.x;
    [*x0, *x1, *x2, *x3] = power::firmware([*x0, *x1, *x2, *x3]);
    skip_instruction();
}

/// An SError while the host runs, which only comes here as long as another is pending for the host.
extern "C" fn host_serror(esr: u64) {
    world_switch::pend_serror(esr);
}

/// Every other synchronous exception of the host.
extern "C" fn host_trap(frame: &mut Frame, esr: u64) {
    match class(esr) {
        EC_DATA_ABORT_LOWER | EC_INSTRUCTION_ABORT_LOWER => host_abort(esr),
        EC_SYSTEM_REGISTER => system_register(frame, esr),
        // Instructions and registers of features that are hidden, and what else is not for EL1.
        _ => resume(exception::take_undefined(interrupted(), features().state)),
    }
}

/// An access that the host's stage 2 does not allow.
fn host_abort(esr: u64) {
    let answer = match faulting_page(esr) {
        Some(page) => boot::hypervisor().host_abort(page, access(esr)),
        None => boot::hypervisor().count_injected(),
    };
    match answer {
        AbortAnswer::Retry => {}
        AbortAnswer::Inject => {
            let taken = exception::take_external_abort(interrupted(), esr, features().state);
            FAR_EL1.set(FAR_EL2.get());
            resume(taken);
        }
    }
}

/// The page of an abort; `None` if there is none that could ever become the host's by another try.
///
/// HPFAR_EL2 holds it for address size, translation and access flag faults, and for permission faults on a
/// stage-1 table walk (Arm ARM, HPFAR_EL2). For any other permission fault the address would have to be
/// translated, which can abort at EL2 if the host has pointed its tables at nothing. There is no need: what the
/// host may do with a page does not change while it has the page, so the fault is final.
fn faulting_page(esr: u64) -> Option<Gfn> {
    const FAULT_TYPE: u64 = 0x3c;
    const ADDRESS_SIZE: u64 = 0b00_0000;
    const TRANSLATION: u64 = 0b00_0100;
    const ACCESS_FLAG: u64 = 0b00_1000;
    const PERMISSION: u64 = 0b00_1100;
    const FIPA_SHIFT: u32 = 4;
    match esr & FAULT_TYPE {
        ADDRESS_SIZE | TRANSLATION | ACCESS_FLAG => {}
        PERMISSION if esr & exception::S1PTW != 0 => {}
        _ => return None,
    }
    Gfn::new(HPFAR_EL2.get() >> FIPA_SHIFT)
}

/// What the access was. Cache maintenance and hardware's table walks count as reads: the host's own rights to
/// a page never depend on it.
fn access(esr: u64) -> Access {
    const WNR: u64 = 1 << 6;
    const CACHE_MAINTENANCE: u64 = 1 << 8;
    if class(esr) == EC_INSTRUCTION_ABORT_LOWER {
        Access::Execute
    } else if esr & WNR != 0 && esr & (CACHE_MAINTENANCE | exception::S1PTW) == 0 {
        Access::Write
    } else {
        Access::Read
    }
}

/// A trapped MRS or MSR: identification registers are answered, everything else is undefined.
fn system_register(frame: &mut Frame, esr: u64) {
    const READ: u64 = 1 << 0;
    let bits = |shift: u32, width: u32| esr >> shift & ((1 << width) - 1);
    let (op0, op2, op1, crn, crm) = (bits(20, 2), bits(17, 3), bits(14, 3), bits(10, 4), bits(1, 4));
    let register = bits(5, 5) as usize;
    if (op0, op1, crn) == (3, 0, 0) && (1..=7).contains(&crm) && esr & READ != 0 {
        let value = id_registers::value(crm, op2);
        // Register 31 is XZR: there is no slot for it, and the value is dropped.
        if let Some(slot) = frame.x.get_mut(register) {
            *slot = value;
        }
        skip_instruction();
    } else {
        resume(exception::take_undefined(interrupted(), features().state));
    }
}

/// Steps over the trapped instruction, as its execution would.
fn skip_instruction() {
    ELR_EL2.set(ELR_EL2.get().wrapping_add(4));
    SPSR_EL2.set(SPSR_EL2.get() & !(pstate::BTYPE | pstate::SS));
}

fn interrupted() -> Interrupted {
    Interrupted { pc: ELR_EL2.get(), pstate: SPSR_EL2.get(), sctlr: SCTLR_EL1.get(), vbar: VBAR_EL1.get() }
}

/// Lets EL1 go on in its exception vector.
fn resume(taken: Taken) {
    ELR_EL1.set(taken.elr_el1);
    SPSR_EL1.set(taken.spsr_el1);
    ESR_EL1.set(taken.esr_el1);
    ELR_EL2.set(taken.pc);
    SPSR_EL2.set(taken.pstate);
}

fn features() -> Features {
    Features::probe()
}
