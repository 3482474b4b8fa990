//! The calls of a guest: which one it is, whether its arguments can be right, and what comes of it.
//!
//! Decoding is pure. All that a guest must trust is answered by EL2.
//! A closed list is handed to the host, which sees x0 to x6 of such a call and gives x0 to x3. Everything
//! else is NOT_SUPPORTED (docs/hypercalls.md, Guest calls). Numbers and argument rules: [`abi::guest`].

use crate::Hypervisor;
use crate::addr::{Gfn, Ipa, PAGE_SIZE, Pages};
use crate::machine::Machine;
use crate::ownership;
use crate::vm::Claim;
use crate::vm::power::Outcome;
use crate::vm::trap::Step;
use crate::vm::vcpu::{Pending, Vcpu};
use crate::watch::{Answer as Told, Asked, Held, Watch};
use abi::exit::{Access, Exit};
use abi::smccc::{FunctionId, INVALID_PARAMETER, NOT_SUPPORTED, SUCCESS};
use abi::{guest, psci, smccc};

/// x0 to x3 of an answer.
pub type Answer = [u64; 4];

/// An answer with x1 to x3 zero.
pub const fn answer(x0: u64) -> Answer {
    [x0, 0, 0, 0]
}

/// What a guest asks for its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// The host may access the pages.
    Share,
    /// The pages are private again.
    Unshare,
    /// The host gets the pages back, wiped.
    Relinquish,
    /// The pages are a device of the host's.
    GuardMap,
    /// They are not any more.
    GuardUnmap,
}

/// A guest's call, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestCall {
    /// The answer is known.
    Answer(Answer),
    /// A call about its own memory.
    Memory(Request, Pages<Gfn>),
    /// From now on only pages given to `GuardMap` are devices.
    Enroll,
    /// Power state coordination.
    Psci {
        /// Function id.
        function: u32,
        /// x1 to x3.
        arguments: [u64; 3],
    },
    /// The host serves it.
    Forward,
}

/// KVM_FUNC_HAS_RANGE: `MEM_SHARE` and `MEM_UNSHARE` take a number of pages (Android's extension of
/// `HYP_MEMINFO`).
const HAS_RANGE: u64 = 1;

/// Functions of a VM that is not protected: only the list itself. Its memory is the host's anyway.
const UNPROTECTED_FEATURES: u64 = 1 << 0;

impl GuestCall {
    /// Decodes x0 to x3 of a guest's HVC.
    #[inline]
    pub fn decode(registers: [u64; 4], protected: bool) -> Self {
        let [x0, x1, x2, x3] = registers;
        let function = FunctionId::from_x0(x0).number();
        match function & OWNER {
            VENDOR => Self::vendor(function, [x1, x2, x3], protected),
            STANDARD if function & NUMBER <= LAST_PSCI => Self::Psci { function, arguments: [x1, x2, x3] },
            _ => match function {
                smccc::VERSION => Self::Answer(answer(smccc::VERSION_1_1)),
                smccc::ARCH_FEATURES => Self::Answer(answer(arch_feature(x1 as u32))),
                _ => Self::Answer(answer(NOT_SUPPORTED)),
            },
        }
    }

    /// The calls of the vendor-specific hypervisor range.
    #[inline]
    fn vendor(function: u32, arguments: [u64; 3], protected: bool) -> Self {
        let memory = |request| match range(arguments) {
            Some(pages) => Self::Memory(request, pages),
            None => Self::Answer(answer(INVALID_PARAMETER)),
        };
        let granule = |x1_out| match arguments {
            [0, 0, 0] => Self::Answer([PAGE_SIZE, x1_out, 0, 0]),
            _ => Self::Answer(answer(INVALID_PARAMETER)),
        };
        match function {
            guest::FEATURES if protected => Self::Answer(answer(guest::PROTECTED_FEATURES)),
            guest::FEATURES => Self::Answer(answer(UNPROTECTED_FEATURES)),
            guest::PTP => Self::Forward,
            smccc::VENDOR_HYP_UID => Self::Answer(guest::KVM_UID.map(u64::from)),
            _ if !protected => Self::Answer(answer(NOT_SUPPORTED)),
            guest::HYP_MEMINFO => granule(HAS_RANGE),
            guest::MEM_SHARE => memory(Request::Share),
            guest::MEM_UNSHARE => memory(Request::Unshare),
            guest::MEM_RELINQUISH => memory(Request::Relinquish),
            guest::MMIO_GUARD_INFO => granule(0),
            guest::MMIO_GUARD_ENROLL => Self::Enroll,
            guest::MMIO_GUARD_MAP => memory(Request::GuardMap),
            guest::MMIO_GUARD_UNMAP => memory(Request::GuardUnmap),
            _ => Self::Answer(answer(NOT_SUPPORTED)),
        }
    }
}

/// The bits of a function id that say whose it is: fast call and owner, whatever the width of its registers.
const OWNER: u32 = 0xbf00_0000;
/// Those that number the owner's functions.
const NUMBER: u32 = 0xffff;
/// The vendor-specific hypervisor range.
const VENDOR: u32 = 0x8600_0000;
/// The standard secure service range, in which PSCI has the numbers up to [`LAST_PSCI`].
const STANDARD: u32 = 0x8400_0000;
const LAST_PSCI: u32 = 0x1f;

/// Pages that one call does at most, counted from the first page of the range: up to the end of the
/// last-level table that it lies in. So a call changes all its pages or none.
pub fn first_chunk(pages: Pages<Gfn>) -> Pages<Gfn> {
    pages.truncated(crate::pgtable::rest_of_region(pages.start().as_u64()))
}

/// The pages that a memory call names: x1 is a page-aligned IPA, x2 a number with 0 for 1, x3 zero.
#[inline]
fn range([ipa, count, zero]: [u64; 3]) -> Option<Pages<Gfn>> {
    let ipa = Ipa::new(ipa).filter(|ipa| ipa.is_page_aligned())?;
    Pages::new(Gfn::containing(ipa), count.max(1)).filter(|_| zero == 0)
}

/// `SMCCC_ARCH_FEATURES`: the workaround calls are not offered. Deed's threat model leaves side channels
/// out, and says so; a guest applies the workarounds that it can apply by itself.
fn arch_feature(function: u32) -> u64 {
    match function {
        smccc::VERSION | smccc::ARCH_FEATURES => SUCCESS,
        _ => NOT_SUPPORTED,
    }
}

impl<M: Machine> Hypervisor<M> {
    /// Serves an HVC with immediate 0.
    pub(super) fn guest_call(&self, claim: &mut Claim) -> Step {
        let [x0, x1, x2, x3, ..] = claim.vcpu.context.x;
        match GuestCall::decode([x0, x1, x2, x3], claim.flags.protected) {
            GuestCall::Answer(answer) => resume_with(&mut claim.vcpu, answer),
            GuestCall::Memory(request, pages) => self.memory_call(claim, request, pages),
            GuestCall::Enroll => {
                self.with_vm(claim.handle, |vm| vm.guarded = true);
                resume_with(&mut claim.vcpu, answer(SUCCESS))
            }
            GuestCall::Psci { function, arguments } => self.psci_call(claim, function, arguments),
            GuestCall::Forward => {
                claim.vcpu.pending = Pending::GuestCall;
                let [_, _, _, _, x4, x5, x6, ..] = claim.vcpu.context.x;
                Step::Exit(Exit::GuestCall { arguments: [x0, x1, x2, x3, x4, x5, x6] })
            }
        }
    }

    fn memory_call(&self, claim: &mut Claim, request: Request, pages: Pages<Gfn>) -> Step {
        let vm = claim.handle;
        let result = match request {
            Request::Share => self.guest_share_host(vm, pages),
            Request::Unshare if claim.flags.unshare_immediate => self.guest_unshare_host(vm, pages),
            Request::Unshare => return self.ask_to_unshare(claim, pages),
            Request::Relinquish => self.guest_relinquish(vm, pages),
            Request::GuardMap => self.guard_map(vm, pages),
            Request::GuardUnmap => self.guard_unmap(vm, pages),
        };
        let done = match result {
            Ok(done) => done,
            Err(ownership::Error::Missing(gfn)) if request == Request::Share => {
                claim.vcpu.context.rewind_call();
                return Step::Exit(Exit::MissingPage { ipa: gfn.base().as_u64(), access: Access::Write });
            }
            Err(ownership::Error::Lacking(lacking)) => {
                claim.vcpu.context.rewind_call();
                return Step::Exit(Exit::NeedPages { pool: lacking.pool, pages: lacking.pages });
            }
            Err(_) => 0,
        };
        resume_with(&mut claim.vcpu, range_answer(done))
    }

    /// The host may have the pages mapped in processes: it is asked first, and its acknowledgement or the
    /// next run takes the pages.
    fn ask_to_unshare(&self, claim: &mut Claim, all: Pages<Gfn>) -> Step {
        let pages = first_chunk(all);
        let is_right = self.with_vm(claim.handle, |vm| {
            let watch = Watch::begin(self, Asked::MayUnshare(claim.handle, all), Held::only_vm(Some(vm)));
            // The call is right as a whole, or it is refused, though only its first chunk is asked for.
            let is_right = vm.space.table.spans(all) && vm.space.all_shared(self.machine(), pages);
            let answer = if is_right { Told::Asks(pages.count()) } else { Told::NotShared };
            watch.end(self, Held::only_vm(Some(vm)), answer);
            is_right
        });
        if is_right != Some(true) {
            return resume_with(&mut claim.vcpu, range_answer(0));
        }
        claim.vcpu.pending = Pending::Unshare(pages);
        Step::Exit(Exit::Unshare { ipa: pages.start().base().as_u64(), pages: pages.count() })
    }

    fn psci_call(&self, claim: &mut Claim, function: u32, arguments: [u64; 3]) -> Step {
        let index = claim.index;
        let outcome = self.with_vm(claim.handle, |vm| vm.serve_psci(function, arguments, index));
        let vcpu = &mut *claim.vcpu;
        match outcome.flatten() {
            None => resume_with(vcpu, answer(NOT_SUPPORTED)),
            Some(Outcome::Return(value)) => resume_with(vcpu, answer(value)),
            Some(Outcome::TurnedOn(target, _)) => {
                set_answer(vcpu, answer(psci::SUCCESS));
                Step::Exit(Exit::CpuOn { vcpu: target })
            }
            Some(Outcome::TurnedOff) => Step::Exit(Exit::CpuOff),
            Some(Outcome::Standby) => {
                set_answer(vcpu, answer(psci::SUCCESS));
                Step::Exit(Exit::Wait { event: false })
            }
            Some(Outcome::SystemOff) => {
                self.vms.end(claim);
                Step::Exit(Exit::SystemOff)
            }
            Some(Outcome::SystemReset) => {
                self.vms.end(claim);
                Step::Exit(Exit::SystemReset)
            }
        }
    }
}

/// The answer of a call about a range: success if anything was done, which x1 says.
pub(super) fn range_answer(done: u64) -> Answer {
    match done {
        0 => answer(INVALID_PARAMETER),
        done => [SUCCESS, done, 0, 0],
    }
}

pub(super) fn set_answer(vcpu: &mut Vcpu, answer: Answer) {
    let [x0, x1, x2, x3, ..] = &mut vcpu.context.x;
    [*x0, *x1, *x2, *x3] = answer;
}

fn resume_with(vcpu: &mut Vcpu, answer: Answer) -> Step {
    set_answer(vcpu, answer);
    Step::Resume
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{RAM_START, World};
    use crate::vm::context::Trap;
    use crate::vm::testing::*;
    use crate::vm::trap::class;
    use abi::host::HostCall;
    use abi::{Error, HostState, VmFlags};

    fn decode(x0: u32, arguments: [u64; 3]) -> GuestCall {
        let [x1, x2, x3] = arguments;
        GuestCall::decode([u64::from(x0), x1, x2, x3], true)
    }

    fn refused() -> GuestCall {
        GuestCall::Answer(answer(INVALID_PARAMETER))
    }

    fn unknown() -> GuestCall {
        GuestCall::Answer(answer(NOT_SUPPORTED))
    }

    #[test]
    fn discovery_names_kvm_and_the_calls_that_are_served() {
        assert_eq!(
            decode(smccc::VENDOR_HYP_UID, [0; 3]),
            GuestCall::Answer([0xb66f_b428, 0xe911_c52e, 0x564b_caa9, 0x743a_004d])
        );
        let GuestCall::Answer([features, 0, 0, 0]) = decode(guest::FEATURES, [0; 3]) else { panic!() };
        for bit in 0..32 {
            let served = [0x8600_0000, 0xc600_0000]
                .iter()
                .any(|base| !matches!(decode(base + bit, [0; 3]), call if call == unknown()));
            // Upstream does not report the clock of the host to a protected guest either.
            assert_eq!(features >> bit & 1 != 0 || bit == 1, served, "function {bit}");
        }
    }

    #[test]
    fn meminfo_with_an_argument_is_refused() {
        assert_eq!(decode(guest::HYP_MEMINFO, [0; 3]), GuestCall::Answer([4096, 1, 0, 0]));
        for arguments in [[1, 0, 0], [0, 1, 0], [0, 0, 1]] {
            assert_eq!(decode(guest::HYP_MEMINFO, arguments), refused());
        }
    }

    #[test]
    fn a_range_without_a_count_is_one_page() {
        let one = Pages::from_raw(0x80000, 1).unwrap();
        for count in [0, 1] {
            let call = decode(guest::MEM_SHARE, [0x8000_0000, count, 0]);
            assert_eq!(call, GuestCall::Memory(Request::Share, one));
        }
    }

    #[test]
    fn absurd_ranges_are_refused() {
        for arguments in [
            [0x8000_0001, 1, 0],
            [0x8000_0800, 1, 0],
            [0x8000_0000, 1, 1],
            [0x8000_0000, u64::MAX, 0],
            [0x8000_0000, 1 << 52, 0],
            [1 << 48, 1, 0],
            [!0xfff, 1, 0],
        ] {
            for function in
                [guest::MEM_SHARE, guest::MEM_UNSHARE, guest::MEM_RELINQUISH, guest::MMIO_GUARD_MAP]
            {
                assert_eq!(decode(function, arguments), refused(), "{arguments:x?}");
            }
        }
    }

    #[test]
    fn a_guest_that_is_not_protected_has_no_memory_calls() {
        for function in guest::HYP_MEMINFO..=guest::MEM_RELINQUISH {
            let call = GuestCall::decode([u64::from(function), 0x8000_0000, 1, 0], false);
            assert_eq!(call, unknown(), "{function:#x}");
        }
        let features = GuestCall::decode([u64::from(guest::FEATURES), 0, 0, 0], false);
        assert_eq!(features, GuestCall::Answer(answer(1)));
    }

    #[test]
    fn only_the_clock_is_handed_to_the_host() {
        let forwarded = |number: u32| decode(number, [0; 3]) == GuestCall::Forward;
        assert!(forwarded(guest::PTP));
        // TRNG, paravirtual time, implementation discovery, a standard hypervisor call, an unknown one.
        for number in [0x8400_0050, 0xc400_0053, 0xc500_0020, 0xc600_0040, 0x8500_ff01, 0xc600_0001, 0] {
            assert_eq!(decode(number, [0; 3]), unknown(), "{number:#x}");
        }
    }

    #[test]
    fn a_chunk_ends_with_its_table() {
        let chunk = |start, count| first_chunk(Pages::from_raw(start, count).unwrap()).count();
        assert_eq!((chunk(0, 1024), chunk(500, 1024), chunk(511, 2), chunk(512, 3)), (512, 12, 1, 3));
    }

    #[test]
    fn only_the_calls_about_calls_are_said_to_be_there() {
        let offered = |function: u32| decode(smccc::ARCH_FEATURES, [function.into(), 0, 0]);
        for function in [smccc::VERSION, smccc::ARCH_FEATURES] {
            assert_eq!(offered(function), GuestCall::Answer(answer(SUCCESS)), "{function:#x}");
        }
        // SMCCC_ARCH_SOC_ID, the workarounds 1 to 3, and none.
        for function in [0x8000_0002, 0x8000_8000, 0x8000_7fff, 0x8000_3fff, 0x8000_0003] {
            assert_eq!(offered(function), unknown(), "{function:#x}");
        }
    }

    #[test]
    fn nothing_of_a_vm_that_turned_itself_off_runs_again() {
        for (function, exit) in [
            (psci::SYSTEM_OFF, Exit::SystemOff),
            (psci::SYSTEM_RESET, Exit::SystemReset),
            (psci::SYSTEM_RESET2, Exit::SystemReset),
        ] {
            let (world, vm) = booted(ASK_FIRST);
            calls(&world, function, [0; 3]);
            assert_eq!(run(&world, vm), exit);
            for vcpu in 0..2 {
                assert_eq!(run_with(&world, vm, vcpu, [0; 4]), Err(Error::Permission));
            }
        }
    }

    #[test]
    fn sharing_a_page_that_is_not_there_exits_for_it_and_is_replayed() {
        let (world, vm) = booted(ASK_FIRST);
        calls(&world, guest::MEM_SHARE, [RAM, 2, 0]);
        assert_eq!(run(&world, vm), Exit::MissingPage { ipa: RAM, access: Access::Write });
        donate(&world, vm, 0x100, RAM);
        guest(&world, |context| {
            assert_eq!((context.pc, context.x[..3].to_vec()), (ENTRY, vec![0xc600_0003, RAM, 2]));
            context.pc = ENTRY + 4;
            sync(class::HVC64, 0)
        });
        assert_eq!(run(&world, vm), Exit::MissingPage { ipa: RAM + 0x1000, access: Access::Write });
        donate(&world, vm, 0x101, RAM + 0x1000);
        guest(&world, |context| {
            context.pc = ENTRY + 4;
            sync(class::HVC64, 0)
        });
        finds(&world, [SUCCESS, 2, 0, 0]);
        assert_eq!(run(&world, vm), Exit::Interrupted);
        assert_eq!(world.host_state(0x101), Some(HostState::SharedBorrowed));
        world.check();
    }

    #[test]
    fn a_call_that_lacks_tables_exits_and_is_replayed() {
        let world = World::new();
        let vm = world.vm(ASK_FIRST, 0x1000, 1);
        world.ok(HostCall::VcpuCreate { vm, vcpu: 0 });
        world.ok(HostCall::VcpuSetBoot { vm, vcpu: 0, pc: ENTRY, x0: 0 });
        world.ok(HostCall::DonateGuest { vm, pfn: RAM_START, gfn: RAM >> 12, pages: 0x200 });
        calls(&world, guest::MEM_SHARE, [RAM, 1, 0]);
        assert_eq!(run(&world, vm), Exit::NeedPages { pool: abi::page::Pool::Vm, pages: 1 });
        world.ok(HostCall::VmTopUp { vm, pfn: RAM_START + 0x1010, pages: 1 });
        guest(&world, |context| {
            assert_eq!(context.pc, ENTRY);
            context.pc = ENTRY + 4;
            sync(class::HVC64, 0)
        });
        finds(&world, [SUCCESS, 1, 0, 0]);
        assert_eq!(run(&world, vm), Exit::Interrupted);
    }

    #[test]
    fn unsharing_what_is_not_shared_is_refused_without_an_exit() {
        let (world, vm) = sharing(ASK_FIRST);
        for range in [[RAM + 0x1000, 1, 0], [RAM, 2, 0], [1 << 40, 1, 0]] {
            calls(&world, guest::MEM_UNSHARE, range);
            finds(&world, [INVALID_PARAMETER, 0, 0, 0]);
            assert_eq!(run(&world, vm), Exit::Interrupted);
        }
        assert_eq!(world.host_state(0x100), Some(HostState::SharedBorrowed));
    }

    #[test]
    fn unsharing_over_the_end_of_the_guests_space_is_refused_whole() {
        let (world, vm) = booted(ASK_FIRST);
        let last = (1 << 28) - 1;
        world.ok(HostCall::DonateGuest { vm, pfn: RAM_START + 0x100, gfn: last, pages: 1 });
        calls(&world, guest::MEM_SHARE, [last << 12, 1, 0]);
        finds(&world, [SUCCESS, 1, 0, 0]);
        assert_eq!(run(&world, vm), Exit::Interrupted);
        calls(&world, guest::MEM_UNSHARE, [last << 12, 2, 0]);
        finds(&world, [INVALID_PARAMETER, 0, 0, 0]);
        assert_eq!(run(&world, vm), Exit::Interrupted);
        assert_eq!(world.host_state(0x100), Some(HostState::SharedBorrowed));
    }

    #[test]
    fn an_immediate_unshare_tells_nobody() {
        let (world, vm) = sharing(VmFlags { unshare_immediate: true, ..ASK_FIRST });
        calls(&world, guest::MEM_UNSHARE, [RAM, 1, 0]);
        finds(&world, [SUCCESS, 1, 0, 0]);
        assert_eq!(run(&world, vm), Exit::Interrupted);
        assert!(!world.host_reads(0x100));
        let ack = world.call(HostCall::UnshareAck { vm, vcpu: 0 });
        assert_eq!(ack.outcome, Err(Error::Permission));
    }

    #[test]
    fn a_relinquished_page_is_the_hosts_again() {
        let (world, vm) = booted(ASK_FIRST);
        donate(&world, vm, 0x100, RAM);
        calls(&world, guest::MEM_RELINQUISH, [RAM, 1, 0]);
        finds(&world, [SUCCESS, 1, 0, 0]);
        assert_eq!(run(&world, vm), Exit::Interrupted);
        assert_eq!(world.host_state(0x100), Some(HostState::Owned));
    }

    #[test]
    fn a_page_that_is_not_there_is_asked_for_only_to_be_shared() {
        let (world, vm) = booted(VmFlags { unshare_immediate: true, ..ASK_FIRST });
        calls(&world, guest::MEM_UNSHARE, [RAM, 1, 0]);
        finds(&world, [INVALID_PARAMETER, 0, 0, 0]);
        assert_eq!(run(&world, vm), Exit::Interrupted);
        calls(&world, guest::MEM_SHARE, [RAM, 1, 0]);
        assert_eq!(run(&world, vm), Exit::MissingPage { ipa: RAM, access: Access::Write });
    }

    #[test]
    fn a_forwarded_call_shows_x0_to_x6_and_takes_x0_to_x3() {
        let (world, vm) = booted(ASK_FIRST);
        guest(&world, |context| {
            context.x = core::array::from_fn(|register| register as u64);
            context.set_x(0, u64::from(guest::PTP));
            context.pc = ENTRY + 4;
            sync(class::HVC64, 0)
        });
        let arguments = [u64::from(guest::PTP), 1, 2, 3, 4, 5, 6];
        assert_eq!(run(&world, vm), Exit::GuestCall { arguments });
        guest(&world, |context| {
            assert_eq!(context.x[..6], [21, 22, 23, 24, 4, 5]);
            Trap::Irq
        });
        assert_eq!(run_with(&world, vm, 0, [21, 22, 23, 24]), Ok(Exit::Interrupted));
    }

    #[test]
    fn the_calls_of_discovery_are_answered_without_an_exit() {
        let (world, vm) = booted(ASK_FIRST);
        calls(&world, guest::FEATURES, [0; 3]);
        finds(&world, [guest::PROTECTED_FEATURES, 0, 0, 0]);
        assert_eq!(run(&world, vm), Exit::Interrupted);
        calls(&world, smccc::VERSION, [0; 3]);
        finds(&world, [smccc::VERSION_1_1, 0, 0, 0]);
        assert_eq!(run(&world, vm), Exit::Interrupted);
        calls(&world, 0x8400_0050, [0; 3]);
        finds(&world, [NOT_SUPPORTED, 0, 0, 0]);
        assert_eq!(run(&world, vm), Exit::Interrupted);
    }
}
