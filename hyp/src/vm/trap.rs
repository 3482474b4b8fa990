//! What follows from a trap of a guest: it goes on, takes an exception, or the host must do something.
//!
//! Every syndrome that hardware can report has an answer here, those that no guest can cause included (I8). What
//! the host is told is an [`Exit`], and nothing else of a protected guest (I10).

use crate::Hypervisor;
use crate::addr::Gfn;
use crate::machine::Machine;
use crate::ownership::query::GuestPage;
use crate::vm::inject::Exception;
use crate::vm::vcpu::Pending;
use crate::vm::{Claim, context::Trap, context::pstate, mmio, sysreg};
use abi::exit::{Access, Exit, Fatal};
use abi::smccc::NOT_SUPPORTED;

/// ESR_EL2 fields (Arm ARM D24.2.40).
mod esr {
    pub(super) const EC_SHIFT: u32 = 26;
    pub(super) const EC_MASK: u64 = 0x3f;
    pub(super) const WNR: u64 = 1 << 6;
    pub(super) const S1PTW: u64 = 1 << 7;
    pub(super) const IMMEDIATE: u64 = 0xffff;
    /// WFE or WFET, not WFI or WFIT.
    pub(super) const WAIT_FOR_EVENT: u64 = 1;
    pub(super) const FAULT_STATUS: u64 = 0x3f;
}

/// Exception classes that a guest can raise to EL2.
pub(crate) mod class {
    pub(crate) const UNKNOWN: u64 = 0x00;
    pub(crate) const WFX: u64 = 0x01;
    pub(crate) const FP: u64 = 0x07;
    pub(crate) const PAUTH: u64 = 0x09;
    pub(crate) const LD64B: u64 = 0x0a;
    pub(crate) const SYSREG_128: u64 = 0x14;
    pub(crate) const HVC64: u64 = 0x16;
    pub(crate) const SMC64: u64 = 0x17;
    pub(crate) const SYSREG: u64 = 0x18;
    pub(crate) const SVE: u64 = 0x19;
    pub(crate) const SME: u64 = 0x1d;
    pub(crate) const INSTRUCTION_ABORT: u64 = 0x20;
    pub(crate) const DATA_ABORT: u64 = 0x24;
}

/// What follows from a trap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// The guest goes on.
    Resume,
    /// The guest takes an exception.
    Inject(Exception),
    /// The host must do something.
    Exit(Exit),
}

impl<M: Machine> Hypervisor<M> {
    /// Decides what follows from a trap.
    pub(super) fn serve(&self, claim: &mut Claim, trap: Trap) -> Step {
        if claim.vcpu.context.pstate & pstate::AARCH32 != 0 {
            return self.end_fatal(claim, Fatal::AArch32);
        }
        let (esr, far, hpfar) = match trap {
            Trap::Sync { esr, far, hpfar } => (esr, far, hpfar),
            Trap::Irq => return Step::Exit(Exit::Interrupted),
            Trap::SError { .. } => return Step::Exit(Exit::SError),
            Trap::Retry => return Step::Resume,
        };
        let vcpu = &mut *claim.vcpu;
        match esr >> esr::EC_SHIFT & esr::EC_MASK {
            class::HVC64 if esr & esr::IMMEDIATE == 0 => self.guest_call(claim),
            class::HVC64 => {
                vcpu.context.set_x(0, NOT_SUPPORTED);
                Step::Resume
            }
            class::DATA_ABORT | class::INSTRUCTION_ABORT => self.guest_abort(claim, esr, far, hpfar),
            class::WFX => {
                vcpu.context.skip_instruction();
                Step::Exit(Exit::Wait { event: esr & esr::WAIT_FOR_EVENT != 0 })
            }
            class::SYSREG => {
                let machine = self.machine();
                match sysreg::emulate(esr, &mut vcpu.context, |register| machine.id_register(register)) {
                    Some(()) => Step::Resume,
                    None => Step::Inject(Exception::Undefined),
                }
            }
            // A guest's calls come by HVC. Nothing is relayed to firmware, not even with immediate 0.
            class::SMC64 => {
                vcpu.context.set_x(0, NOT_SUPPORTED);
                vcpu.context.skip_instruction();
                Step::Resume
            }
            class::UNKNOWN
            | class::FP
            | class::PAUTH
            | class::LD64B
            | class::SYSREG_128
            | class::SVE
            | class::SME => Step::Inject(Exception::Undefined),
            _ => self.end_fatal(claim, Fatal::Unexpected),
        }
    }

    fn end_fatal(&self, claim: &Claim, why: Fatal) -> Step {
        self.vms.end(claim);
        Step::Exit(Exit::Fatal(why))
    }

    /// A stage-2 abort, or an external abort that was routed to EL2.
    fn guest_abort(&self, claim: &mut Claim, esr: u64, far: u64, hpfar: u64) -> Step {
        let instruction = esr >> esr::EC_SHIFT & esr::EC_MASK == class::INSTRUCTION_ABORT;
        let refuse = Step::Inject(Exception::ExternalAbort { esr, far });
        let permission = match esr & esr::FAULT_STATUS {
            // A translation fault at level 0 is an address beyond the guest's space: no memory can come.
            // Translation faults at the other levels, and access flag faults.
            0b00_0101..=0b00_1011 => false,
            0b00_1100..=0b00_1111 if !claim.flags.protected => true,
            _ => return refuse,
        };
        let Some(gfn) = fault_page(hpfar) else { return refuse };
        let walk = esr & esr::S1PTW != 0;
        let access = match (instruction, esr & esr::WNR != 0) {
            _ if walk => Access::Read,
            (true, _) => Access::Execute,
            (false, true) => Access::Write,
            (false, false) => Access::Read,
        };
        let missing = Step::Exit(Exit::MissingPage { ipa: gfn.base().as_u64(), access });
        match self.guest_page(claim.handle, gfn) {
            // The host has given the page meanwhile, or it lends less than the access needs.
            GuestPage::Present if permission => missing,
            GuestPage::Present => Step::Resume,
            GuestPage::Poisoned => refuse,
            GuestPage::Device if instruction => refuse,
            GuestPage::Device => self.mmio(claim, esr, far, gfn).unwrap_or(refuse),
            GuestPage::Missing if !instruction && self.is_unguarded(claim) => {
                self.mmio(claim, esr, far, gfn).unwrap_or(missing)
            }
            GuestPage::Missing => missing,
        }
    }

    /// Whether every address without memory counts as a device, with its data for the host: a VM that is
    /// not protected, or one that was made for guests that do not know the guard, until it enrols.
    fn is_unguarded(&self, claim: &Claim) -> bool {
        let flags = claim.flags;
        !flags.protected
            || flags.mmio_unguarded && self.with_vm(claim.handle, |vm| !vm.guarded).unwrap_or(false)
    }

    /// Shows an access to a device to the host; `None` if its syndrome does not tell enough.
    fn mmio(&self, claim: &mut Claim, esr: u64, far: u64, gfn: Gfn) -> Option<Step> {
        // Stage 1 keeps the offset in the page.
        let ipa = gfn.base().checked_add(far % crate::addr::PAGE_SIZE)?;
        let access = mmio::Access::decode(esr, ipa)?;
        let value = access.value(&claim.vcpu.context);
        claim.vcpu.pending = Pending::Mmio(access);
        let (ipa, size, write) = (ipa.as_u64(), access.size, access.write);
        Some(Step::Exit(Exit::Mmio { ipa, size, write, value }))
    }
}

/// The page of an HPFAR_EL2 value; `None` beyond what a stage 2 of 4 KiB pages can translate.
fn fault_page(hpfar: u64) -> Option<Gfn> {
    const FIPA_SHIFT: u32 = 4;
    const FIPA_BITS: u64 = (1 << 40) - 1;
    Gfn::new(hpfar >> FIPA_SHIFT & FIPA_BITS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::RAM_START;
    use crate::vm::testing::*;
    use abi::guest::INVALID_PARAMETER;
    use abi::host::HostCall;
    use abi::smccc::SUCCESS;
    use abi::{Error, VmFlags, guest, psci};

    #[test]
    fn aarch32_state_ends_the_vm_whatever_the_trap() {
        for trap in [Trap::Irq, Trap::Retry, Trap::SError { esr: 0 }, sync(class::WFX, 0)] {
            let (world, vm) = booted(ASK_FIRST);
            guest(&world, move |context| {
                context.pstate = pstate::AARCH32;
                trap
            });
            assert_eq!(run(&world, vm), Exit::Fatal(Fatal::AArch32));
            assert_eq!(run_with(&world, vm, 0, [0; 4]), Err(Error::Permission));
        }
    }

    #[test]
    fn an_exception_that_no_guest_can_raise_ends_the_vm() {
        let (world, vm) = booted(ASK_FIRST);
        guest(&world, |_| sync(0x3f, 0));
        assert_eq!(run(&world, vm), Exit::Fatal(Fatal::Unexpected));
        assert_eq!(run_with(&world, vm, 0, [0; 4]), Err(Error::Permission));
    }

    #[test]
    fn calls_by_smc_or_with_an_immediate_are_not_supported() {
        let (world, vm) = booted(ASK_FIRST);
        guest(&world, |context| {
            context.set_x(0, u64::from(psci::SYSTEM_OFF));
            context.pc = ENTRY + 4;
            sync(class::HVC64, 1)
        });
        guest(&world, |context| {
            assert_eq!((context.x(0), context.pc), (NOT_SUPPORTED, ENTRY + 4));
            context.set_x(0, u64::from(psci::SYSTEM_OFF));
            context.pc = ENTRY;
            sync(class::SMC64, 0)
        });
        guest(&world, |context| {
            assert_eq!((context.x(0), context.pc), (NOT_SUPPORTED, ENTRY + 4));
            Trap::Irq
        });
        assert_eq!(run(&world, vm), Exit::Interrupted);
    }

    #[test]
    fn a_wait_steps_over_its_instruction_and_says_for_what() {
        for (iss, event) in [(0, false), (1, true), (2, false), (3, true)] {
            let (world, vm) = booted(ASK_FIRST);
            guest(&world, move |_| sync(class::WFX, iss));
            assert_eq!(run(&world, vm), Exit::Wait { event });
            guest(&world, |context| {
                assert_eq!(context.pc, ENTRY + 4);
                Trap::Irq
            });
            run(&world, vm);
        }
    }

    #[test]
    fn a_missing_page_exits_with_its_page_and_the_kind_of_access_only() {
        let (world, vm) = booted(ASK_FIRST);
        let cases = [
            (class::DATA_ABORT, ISV | 3 << 22 | 5 << 16, Access::Read),
            (class::DATA_ABORT, ISV | esr::WNR, Access::Write),
            (class::DATA_ABORT, esr::S1PTW | esr::WNR, Access::Read),
            (class::INSTRUCTION_ABORT, 0, Access::Execute),
        ];
        for (class, iss, access) in cases {
            guest(&world, move |_| abort(class, iss | TRANSLATION_3, RAM + 0x5678));
            let exit = world.call(HostCall::VcpuRun { vm, vcpu: 0, values: [0; 4] });
            assert_eq!(exit.values, [2, RAM + 0x5000, access as u64, 0, 0, 0, 0, 0]);
        }
        donate(&world, vm, 0x100, RAM + 0x5000);
        touches(&world, TRANSLATION_3, RAM + 0x5678);
        assert_eq!(run(&world, vm), Exit::Interrupted, "the page has come meanwhile");
    }

    #[test]
    fn an_address_beyond_the_guests_space_is_an_external_abort() {
        let (world, vm) = booted(ASK_FIRST);
        for (iss, hpfar) in [(0b00_0100, 1 << 32), (TRANSLATION_3, u64::MAX), (0b01_0000, 0), (0b11_0101, 0)]
        {
            guest(&world, move |context| {
                context.pc = ENTRY;
                Trap::Sync { esr: class::DATA_ABORT << 26 | IL | iss, far: 0, hpfar }
            });
            handles(&world, 0x25 << 26 | IL | esr::S1PTW | 0b01_0000);
            assert_eq!(run(&world, vm), Exit::Interrupted);
        }
    }

    #[test]
    fn a_page_taken_by_force_is_an_external_abort_and_nothing_of_the_hosts() {
        let unguarded = VmFlags { mmio_unguarded: true, ..ASK_FIRST };
        for flags in [ASK_FIRST, unguarded] {
            let (world, vm) = booted(flags);
            donate(&world, vm, 0x100, RAM);
            world.ok(HostCall::ForceReclaim { pfn: RAM_START + 0x100, pages: 1 });
            for iss in [0, esr::WNR, ISV | 2 << 22 | 5 << 16 | esr::WNR] {
                touches(&world, TRANSLATION_3 | iss, RAM + 8);
                handles(&world, 0x25 << 26 | IL | esr::S1PTW | iss & esr::WNR | 0b01_0000);
                assert_eq!(run(&world, vm), Exit::Interrupted, "the host sees no exit about it");
            }
            guest(&world, |context| {
                context.pc = ENTRY;
                abort(class::INSTRUCTION_ABORT, TRANSLATION_3, RAM)
            });
            handles(&world, 0x21 << 26 | IL | esr::S1PTW | 0b01_0000);
            assert_eq!(run(&world, vm), Exit::Interrupted);
            for call in [guest::MEM_SHARE, guest::MEM_UNSHARE, guest::MEM_RELINQUISH, guest::MMIO_GUARD_MAP] {
                calls(&world, call, [RAM, 1, 0]);
                finds(&world, [INVALID_PARAMETER, 0, 0, 0]);
                assert_eq!(run(&world, vm), Exit::Interrupted, "{call:#x}");
            }
        }
    }

    #[test]
    fn a_permission_fault_of_a_protected_guest_is_its_own() {
        let (world, vm) = booted(ASK_FIRST);
        touches(&world, 0b00_1111 | esr::WNR, RAM);
        handles(&world, 0x25 << 26 | IL | esr::S1PTW | esr::WNR | 0b01_0000);
        assert_eq!(run(&world, vm), Exit::Interrupted);
    }

    #[test]
    fn an_access_that_a_loan_does_not_allow_exits_and_is_not_tried_again_for_ever() {
        let (world, vm) = booted(VmFlags::default());
        let permissions = abi::page::Permissions { write: false, execute: false };
        world.ok(HostCall::ShareGuest { vm, pfn: RAM_START + 0x100, gfn: RAM >> 12, pages: 1, permissions });
        let permission_3 = 0b00_1111;
        touches(&world, permission_3 | esr::WNR, RAM + 8);
        assert_eq!(run(&world, vm), Exit::MissingPage { ipa: RAM, access: Access::Write });
        guest(&world, move |_| abort(class::INSTRUCTION_ABORT, permission_3, RAM));
        assert_eq!(run(&world, vm), Exit::MissingPage { ipa: RAM, access: Access::Execute });
    }

    #[test]
    fn a_device_access_is_shown_and_completed_once() {
        let (world, vm) = booted(ASK_FIRST);
        calls(&world, guest::MMIO_GUARD_ENROLL, [0; 3]);
        calls(&world, guest::MMIO_GUARD_MAP, [DEVICE, 0, 0]);
        finds(&world, [SUCCESS, 1, 0, 0]);
        assert_eq!(run(&world, vm), Exit::Interrupted);
        touches(&world, ISV | 1 << 22 | 5 << 16 | esr::WNR | TRANSLATION_3, DEVICE + 0x10);
        let store = Exit::Mmio { ipa: DEVICE + 0x10, size: 2, write: true, value: 0x7788 };
        assert_eq!(run(&world, vm), store);
        guest(&world, |context| {
            assert_eq!((context.pc, context.x(5)), (ENTRY + 4, 0x1122_3344_5566_7788));
            context.pc = ENTRY;
            abort(class::DATA_ABORT, ISV | 5 << 16 | TRANSLATION_3, DEVICE)
        });
        assert_eq!(run(&world, vm), Exit::Mmio { ipa: DEVICE, size: 1, write: false, value: 0 });
        guest(&world, |context| {
            assert_eq!((context.pc, context.x(5)), (ENTRY + 4, 0xcd));
            Trap::Irq
        });
        assert_eq!(run_with(&world, vm, 0, [0xabcd, 9, 9, 9]), Ok(Exit::Interrupted));
        guest(&world, |context| {
            assert_eq!((context.pc, context.x(5)), (ENTRY + 4, 0xcd), "completed once");
            Trap::Irq
        });
        assert_eq!(run_with(&world, vm, 0, [1; 4]), Ok(Exit::Interrupted));
    }

    #[test]
    fn a_device_access_that_cannot_be_shown_is_an_external_abort() {
        let (world, vm) = booted(ASK_FIRST);
        calls(&world, guest::MMIO_GUARD_MAP, [DEVICE, 1, 0]);
        touches(&world, TRANSLATION_3, DEVICE);
        handles(&world, 0x25 << 26 | IL | esr::S1PTW | 0b01_0000);
        assert_eq!(run(&world, vm), Exit::Interrupted);
        guest(&world, |context| {
            context.pc = ENTRY;
            // Its syndrome has no access in it, whatever stands there.
            abort(class::INSTRUCTION_ABORT, ISV | 2 << 22 | 5 << 16 | TRANSLATION_3, DEVICE)
        });
        handles(&world, 0x21 << 26 | IL | esr::S1PTW | 0b01_0000);
        assert_eq!(run(&world, vm), Exit::Interrupted);
    }

    #[test]
    fn a_guest_without_a_guard_shows_data_until_it_enrolls() {
        let (world, vm) = booted(VmFlags { mmio_unguarded: true, ..ASK_FIRST });
        let store = ISV | 2 << 22 | 5 << 16 | esr::WNR | TRANSLATION_3;
        touches(&world, store, DEVICE);
        assert_eq!(run(&world, vm), Exit::Mmio { ipa: DEVICE, size: 4, write: true, value: 0x5566_7788 });
        touches(&world, store, RAM);
        assert!(matches!(run(&world, vm), Exit::Mmio { .. }));
        donate(&world, vm, 0x100, RAM);
        guest(&world, |context| {
            assert_eq!(context.pc, ENTRY, "memory has come, so the store runs again");
            Trap::Irq
        });
        assert_eq!(run(&world, vm), Exit::Interrupted);
        calls(&world, guest::MMIO_GUARD_ENROLL, [0; 3]);
        touches(&world, store, DEVICE);
        assert_eq!(run(&world, vm), Exit::MissingPage { ipa: DEVICE, access: Access::Write });
    }

    #[test]
    fn a_system_register_is_emulated_or_undefined() {
        // MRS x5, ID_AA64DFR0_EL1; MRS x5, ICC_IAR1_EL1.
        const DFR0: u64 = 3 << 20 | 5 << 5 | 5 << 1 | 1;
        const IAR1: u64 = 3 << 20 | 12 << 10 | 5 << 5 | 12 << 1 | 1;
        let (world, vm) = booted(ASK_FIRST);
        guest(&world, |_| sync(class::SYSREG, DFR0));
        guest(&world, |context| {
            assert_eq!((context.pc, context.x(5) & 0xf), (ENTRY + 4, 6));
            context.pc = ENTRY;
            sync(class::SYSREG, IAR1)
        });
        handles(&world, IL);
        assert_eq!(run(&world, vm), Exit::Interrupted);
        guest(&world, |context| {
            context.pc = ENTRY;
            context.pstate = pstate::RESET;
            sync(class::SVE, 0)
        });
        handles(&world, IL);
        assert_eq!(run(&world, vm), Exit::Interrupted);
    }
}
