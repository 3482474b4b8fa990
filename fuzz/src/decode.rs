//! Registers from outside: every decoder of calls and syndromes, which must neither panic nor take one thing for
//! another. What a decoder accepts it must give back as it was (a call encodes to the registers that it came from, as
//! far as they count), and what it serves must touch no register but the one that the instruction names.

use crate::Outcomes;
use crate::input::Input;
use abi::exit::Exit;
use abi::host::{CALLS, DecodeError, HostCall, HostResult};
use abi::smccc::{self, NOT_SUPPORTED};
use abi::{Error, VmHandle, guest, psci as numbers};
use hyp::addr::{Gfn, Ipa, PAGE_SIZE};
use hyp::exception::StateFeatures;
use hyp::psci::{self, End};
use hyp::vm::context::{Context, pstate};
use hyp::vm::guest_call::{GuestCall, first_chunk};
use hyp::vm::inject::Exception;
use hyp::vm::power::{self, Power};
use hyp::vm::{mmio, sysreg};
use hyp::{exception, smc};
use std::mem::discriminant;

/// Plays one input: what kind of registers, and the registers.
///
/// # Panics
/// If a promise is broken.
pub fn run(data: &[u8], outcomes: &mut Outcomes) {
    let mut input = Input::new(data);
    match input.byte() % 8 {
        0 => host_call(&mut input, outcomes),
        1 => guest_call(&mut input, outcomes),
        2 => firmware_call(&mut input, outcomes),
        3 => system_register(&mut input, outcomes),
        4 => device_access(&mut input, outcomes),
        5 => host_words(&mut input, outcomes),
        6 => exception_of_el1(&mut input, outcomes),
        _ => power_call(&mut input, outcomes),
    }
}

/// A function id: one that exists, near one, or anything.
fn function(input: &mut Input<'_>, known: &[u32]) -> u64 {
    let choice = usize::from(input.byte());
    match known.get(choice % (known.len() + 2)) {
        Some(id) if choice < 2 * (known.len() + 2) => (*id).into(),
        Some(id) => u64::from(*id) ^ input.word(),
        None => input.word(),
    }
}

/// Which known function it is.
fn place(known: &[u32], x0: u64) -> Option<usize> {
    known.iter().position(|id| *id == x0 as u32 & !smccc::SVE_HINT)
}

fn host_call(input: &mut Input<'_>, outcomes: &mut Outcomes) {
    let known: Vec<u32> = CALLS.iter().map(|call| call.number).collect();
    let x0 = function(input, &known);
    let [a, b, c, d, e, f] = input.words();
    let decoded = HostCall::decode(&[x0, a, b, c, d, e, f]);
    let number = x0 as u32 & !smccc::SVE_HINT;
    outcomes.note(("host", decoded.map(|call| discriminant(&call)).map_err(|error| discriminant(&error))));
    let listed = CALLS.iter().find(|call| call.number == number);
    match decoded {
        Ok(call) => {
            let info = listed.expect("what decodes is listed");
            let words = call.encode();
            assert_eq!(words[0], u64::from(number));
            let taken = &[a, b, c, d, e, f][..info.arguments.len()];
            assert_eq!(&words[1..=taken.len()], taken, "{call:x?} is not what was asked for");
            assert_eq!(words[taken.len() + 1..], [0; 6][taken.len()..], "{call:x?} has grown");
            assert_eq!(HostCall::decode(&words), Ok(call));
        }
        Err(DecodeError::BadArgument(error)) => {
            assert!(listed.is_some() && matches!(error, Error::Invalid | Error::NoEntry), "{error}");
        }
        Err(DecodeError::UnknownFunction) => assert_eq!(listed, None),
    }
}

fn guest_call(input: &mut Input<'_>, outcomes: &mut Outcomes) {
    const KNOWN: [u32; 14] = [
        smccc::VERSION,
        smccc::ARCH_FEATURES,
        smccc::VENDOR_HYP_UID,
        guest::FEATURES,
        guest::PTP,
        guest::HYP_MEMINFO,
        guest::MEM_SHARE,
        guest::MEM_UNSHARE,
        guest::MEM_RELINQUISH,
        guest::MMIO_GUARD_INFO,
        guest::MMIO_GUARD_ENROLL,
        guest::MMIO_GUARD_MAP,
        guest::MMIO_GUARD_UNMAP,
        numbers::CPU_ON,
    ];
    let protected = input.byte() & 1 == 0;
    let x0 = function(input, &KNOWN);
    let [x1, x2, x3] = input.words();
    let call = GuestCall::decode([x0, x1, x2, x3], protected);
    outcomes.note(("guest", protected, place(&KNOWN, x0), discriminant(&call)));
    match call {
        GuestCall::Memory(request, pages) => {
            outcomes.note((format!("{request:?}"), pages.count() > 0x200));
            assert!(protected, "memory calls are a protected guest's");
            assert_eq!((x1 % PAGE_SIZE, x3), (0, 0));
            assert_eq!((pages.start().base().as_u64(), pages.count()), (x1, x2.max(1)));
            assert!(pages.end() <= 1 << 36, "the run leaves the address space");
            let chunk = first_chunk(pages);
            assert_eq!(chunk.start(), pages.start());
            assert!((1..=0x200).contains(&chunk.count()) && chunk.count() <= pages.count());
            assert_eq!(chunk.start().as_u64() >> 9, (chunk.end() - 1) >> 9, "a chunk lies in one table");
        }
        GuestCall::Psci { function, arguments } => {
            assert_eq!(function & 0xbf00_ffe0, 0x8400_0000, "{function:#x} is no power call");
            assert_eq!(arguments, [x1, x2, x3]);
        }
        GuestCall::Forward => {
            assert_eq!(x0 as u32 & 0xbf00_ffff & !smccc::SVE_HINT, guest::PTP & 0xbf00_ffff)
        }
        GuestCall::Enroll => assert!(protected),
        GuestCall::Answer(answer) => outcomes.note(answer),
    }
}

fn firmware_call(input: &mut Input<'_>, outcomes: &mut Outcomes) {
    const KNOWN: [u32; 14] = [
        smccc::VERSION,
        smccc::ARCH_FEATURES,
        numbers::VERSION,
        numbers::FEATURES,
        numbers::MIGRATE_INFO_TYPE,
        numbers::AFFINITY_INFO,
        numbers::SYSTEM_OFF,
        numbers::SYSTEM_RESET,
        numbers::SYSTEM_RESET2,
        numbers::CPU_ON,
        numbers::CPU_OFF,
        numbers::CPU_SUSPEND,
        smccc::ARCH_WORKAROUND_1,
        smccc::TRNG_RND,
    ];
    let immediate = if input.byte() < 200 { 0 } else { input.byte().into() };
    let x0 = function(input, &KNOWN);
    let [a, b, c] = input.words();
    let answer = smc::answer([x0, a, b, c], immediate);
    outcomes.note((
        "firmware",
        immediate != 0,
        answer == psci::Answer::Value(NOT_SUPPORTED),
        discriminant(&answer),
    ));
    match answer {
        psci::Answer::End(End::Off) => assert_eq!(x0 as u32 & !smccc::SVE_HINT, numbers::SYSTEM_OFF),
        psci::Answer::End(End::Reset) => assert_eq!(x0 as u32 & !smccc::SVE_HINT, numbers::SYSTEM_RESET),
        psci::Answer::Power(power) => {
            outcomes.note(discriminant(&power));
            let number = x0 as u32 & !smccc::SVE_HINT;
            let expected = match power {
                psci::Power::On { target, start } => {
                    assert_eq!((target, start.entry, start.context), (a, b, c));
                    numbers::CPU_ON
                }
                psci::Power::Suspend { state, start } => {
                    assert_eq!((state, start.entry, start.context), (a as u32, b, c));
                    numbers::CPU_SUSPEND
                }
                psci::Power::Off => numbers::CPU_OFF,
                psci::Power::Info { target } => {
                    assert_eq!((target, 0), (a, b));
                    numbers::AFFINITY_INFO
                }
                psci::Power::SuspendFeatures => {
                    assert_eq!(a as u32, numbers::CPU_SUSPEND);
                    numbers::FEATURES
                }
            };
            assert_eq!(number, expected);
        }
        psci::Answer::Firmware => {
            const WORKAROUNDS: [u32; 3] = [0x8000_8000, 0x8000_7fff, 0x8000_3fff];
            let number = x0 as u32 & !smccc::SVE_HINT;
            let is_random = (0x8400_0050..=0x8400_0053).contains(&(number & !(1 << 30)));
            let asks = number == smccc::ARCH_FEATURES && WORKAROUNDS.contains(&(a as u32));
            assert!(is_random || asks || WORKAROUNDS.contains(&number), "{number:#x} reaches the firmware");
        }
        psci::Answer::Value(value) => {
            outcomes.note(("firmware", place(&KNOWN, x0), value));
        }
    }
    if immediate != 0 {
        assert_eq!(answer, psci::Answer::Value(NOT_SUPPORTED), "an immediate makes it no call");
    }
}

/// A context whose every register is its own number, so that a change shows.
fn marked() -> Context {
    let mut context = Context::default();
    (0..31).for_each(|register| context.set_x(register, 0x1111 * u64::from(register)));
    context.pc = 0x8000_0000;
    context
}

/// Checks that nothing but this general register and the program counter has changed.
fn only_changes(context: &Context, register: u8) {
    let mut before = marked();
    before.pc = context.pc;
    before.pstate = context.pstate;
    before.set_x(register, context.x(register));
    assert!(before == *context, "more than x{register} has changed");
}

fn system_register(input: &mut Input<'_>, outcomes: &mut Outcomes) {
    let esr = u64::from(u32::from_le_bytes(input.bytes()));
    let machine = input.word();
    let mut context = marked();
    let served = sysreg::emulate(esr, &mut context, |_| machine).is_some();
    let register = (esr >> 5 & 0x1f) as u8;
    let space = (esr >> 20 & 3, esr >> 10 & 0xf);
    outcomes.note(("sysreg", served, esr & 1, served.then_some(space)));
    only_changes(&context, register);
    if esr & 1 == 0 || !served {
        assert!(context.x(register) == marked().x(register), "a write has changed its source");
    }
    assert_eq!(context.pc, if served { 0x8000_0004 } else { 0x8000_0000 });
    // The other view of the same machine: with no feature at all. A guest never sees more than the machine has.
    if served && esr & 1 != 0 {
        let mut bare = marked();
        assert!(sysreg::emulate(esr, &mut bare, |_| 0).is_some(), "what there is depends on the machine");
    }
}

fn device_access(input: &mut Input<'_>, outcomes: &mut Outcomes) {
    let esr = u64::from(u32::from_le_bytes(input.bytes())) | u64::from(input.byte() & 1) << 24;
    let [ipa, value] = input.words();
    let Some(ipa) = Ipa::new(ipa & 0xffff_ffff_ffff) else { return };
    let Some(access) = mmio::Access::decode(esr, ipa) else {
        outcomes.note(("mmio", "none"));
        return;
    };
    outcomes.note(("mmio", access.size, access.write, esr >> 15 & 1, esr >> 21 & 1));
    assert!(matches!(access.size, 1 | 2 | 4 | 8));
    assert!(ipa.page_offset() + u64::from(access.size) <= PAGE_SIZE, "the access leaves its page");
    let mut context = marked();
    let bits = u32::from(access.size) * 8;
    assert!(bits == 64 || access.value(&context) >> bits == 0, "a store shows more than its bytes");
    let register = (esr >> 16 & 0x1f) as u8;
    access.complete(&mut context, value);
    only_changes(&context, register);
    assert_eq!(context.pc, 0x8000_0004);
    if access.write {
        assert!(context.x == marked().x, "a store has changed a register");
    } else if register < 31 {
        let mask = if bits == 64 { u64::MAX } else { (1 << bits) - 1 };
        let width = if esr >> 15 & 1 == 0 { u64::from(u32::MAX) } else { u64::MAX };
        let loaded = context.x(register);
        assert_eq!(loaded & mask, value & mask & width);
        let rest = loaded & !mask;
        let sign = !mask & width;
        assert!(rest == 0 || rest == sign, "{loaded:#x} is neither zero- nor sign-extended");
    }
}

/// Words by which host and hypervisor name things to each other.
fn host_words(input: &mut Input<'_>, outcomes: &mut Outcomes) {
    let exit: [u64; 8] = std::array::from_fn(|_| input.pick(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]));
    if let Some(exit) = Exit::from_words(exit) {
        outcomes.note(("exit", discriminant(&exit)));
        let words = exit.to_words();
        assert_eq!(Exit::from_words(words), Some(exit), "an exit does not survive its words");
    }
    let result: [u64; 10] = input.words();
    if let Some(result) = HostResult::from_words(&result) {
        outcomes.note(("result", result.outcome));
    }
    let word = input.word();
    if let Some(handle) = VmHandle::from_word(word) {
        outcomes.note("handle");
        assert_eq!(handle.to_word(), word);
    }
    if let Some(gfn) = Gfn::new(word) {
        assert_eq!(gfn.as_u64(), word);
    }
}

fn features(bits: u8) -> StateFeatures {
    let bit = |n: u8| bits >> n & 1 != 0;
    StateFeatures { pan: bit(0), ssbs: bit(1), dit: bit(2), tco: bit(3), nmi: bit(4) }
}

fn exception_of_el1(input: &mut Input<'_>, outcomes: &mut Outcomes) {
    let features = features(input.byte());
    let kind = input.byte() & 1;
    let [state, sctlr, vbar, esr, far] = input.words();
    let mut context = marked();
    context.pstate = state & u64::from(u32::MAX);
    context.el1.sctlr_el1 = sctlr;
    context.el1.vbar_el1 = vbar;
    let (pc, before) = (context.pc, context.pstate);
    let exception = match kind {
        0 => Exception::Undefined,
        _ => Exception::ExternalAbort { esr, far },
    };
    exception.deliver(&mut context, features);
    let after = context.pstate;
    outcomes.note(("exception", kind, before & (pstate::MODE | pstate::AARCH32), context.el1.esr_el1 >> 26));
    assert_eq!(after & (pstate::MODE | pstate::AARCH32), pstate::EL1H, "an exception ends at EL1");
    assert_eq!(after & pstate::DAIF, pstate::DAIF);
    assert_eq!(after & (pstate::SS | pstate::IL | pstate::BTYPE), 0);
    assert_eq!((context.el1.elr_el1, context.el1.spsr_el1), (pc, before));
    assert!(matches!(context.pc.wrapping_sub(vbar), 0 | 0x200 | 0x400 | 0x600), "no vector is there");
    assert!(context.x == marked().x);
    let status = context.el1.esr_el1 & 0x3f;
    assert_eq!(status, if kind == 0 { 0 } else { exception::SYNCHRONOUS_EXTERNAL_ABORT });
}

fn power_call(input: &mut Input<'_>, outcomes: &mut Outcomes) {
    const KNOWN: [u32; 10] = [
        numbers::VERSION,
        numbers::FEATURES,
        numbers::CPU_ON,
        numbers::CPU_ON,
        numbers::CPU_OFF,
        numbers::CPU_SUSPEND,
        numbers::AFFINITY_INFO,
        numbers::SYSTEM_OFF,
        numbers::SYSTEM_RESET2,
        numbers::MIGRATE_INFO_TYPE,
    ];
    let mut states = [Power::Off; 4];
    let count = usize::from(input.byte() % 5);
    let states = &mut states[..count];
    for state in &mut *states {
        *state = match input.byte() % 4 {
            0 => Power::Off,
            1 => Power::Stopped,
            2 => Power::Pending,
            _ => Power::On,
        };
    }
    let caller = usize::from(input.byte());
    let id = function(input, &KNOWN) as u32;
    let arguments = [input.pick(&[0, 1, 2, 3, 4]), input.pick(&[0, 0x1000, 2]), input.pick(&[0, 7])];
    let before = states.to_vec();
    let outcome = power::call(id, arguments, caller, states);
    outcomes.note(("power", outcome.map(|outcome| discriminant(&outcome)), place(&KNOWN, id.into())));
    if let Some(power::Outcome::Return(value)) = outcome {
        outcomes.note(("power", value));
    }
    for (index, (before, after)) in before.iter().zip(&*states).enumerate() {
        match (id, before == after) {
            (_, true) => {}
            (numbers::CPU_ON, _) => {
                assert!(matches!(before, Power::Off | Power::Stopped), "a vCPU that is on was turned on");
                assert_eq!(*after, Power::Pending);
                let start = power::Start { pc: arguments[1], context_id: arguments[2] };
                assert_eq!(outcome, Some(power::Outcome::TurnedOn(arguments[0], start)));
                assert_eq!((arguments[0], arguments[1] & 3), (index as u64, 0));
            }
            (numbers::CPU_OFF, _) => assert_eq!((index, *after), (caller, Power::Stopped)),
            _ => panic!("{id:#x} has changed vCPU {index}: {before:?} {after:?}"),
        }
    }
}
