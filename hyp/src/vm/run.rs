//! Running a vCPU: from the host's call to the exit that it returns, a loop over typed traps.
//!
//! The vCPU is claimed for all of it, so nobody else touches its record; the VM's own state (power states,
//! whether it has ended) is behind the VM's lock, which is taken for single questions and never held while a
//! guest runs. What EL2 can answer it answers with the guest still loaded; an exit to the host carries what
//! [`abi::exit`] says and nothing else (invariant I10; what follows from a trap is `trap`'s business), and no
//! value of the guest or of the host can make this loop panic or go on for ever without an interrupt getting
//! through (I8): every turn enters the guest, and an entry with an interrupt pending is an exit.

use crate::Hypervisor;
use crate::addr::{Gfn, Pages};
use crate::call::unit;
use crate::hypervisor::Counters;
use crate::machine::Machine;
use crate::ownership;
use crate::ownership::query::GuestPage;
use crate::vm::context::Trap;
use crate::vm::guest_call::{range_answer, set_answer};
use crate::vm::inject::guest_state;
use crate::vm::power::{self, Power, Start};
use crate::vm::trap::Step;
use crate::vm::vcpu::Pending;
use crate::vm::{Claim, Vm};
use abi::exit::{EXIT_WORDS, Exit};
use abi::host::HostResult;
use abi::{Error, VmHandle};

/// What became of a pending unshare.
enum Unshare {
    /// It is over, with so many pages, or none because a page was no longer shared.
    Done(u64),
    /// Table pages are lacking, and it is still pending.
    Lacking(crate::pool::Lacking),
}

/// How a vCPU enters a CPU.
#[derive(Clone, Copy)]
struct Entry {
    /// The guest has just turned it on, and said where it starts.
    starts: bool,
    /// Another vCPU of the VM was the last one on this CPU.
    changed: bool,
}

impl Entry {
    /// Whether the vCPU may run now, and how. From here on it counts as on.
    #[inline]
    fn of(vm: &mut Vm, cpu: usize, index: usize) -> Result<Self, Error> {
        let state = vm.power.get_mut(index).ok_or(Error::NoEntry)?;
        if matches!(*state, Power::Off | Power::Stopped) {
            return Err(Error::Again);
        }
        let starts = core::mem::replace(state, Power::On) == Power::Pending;
        Ok(Self { starts, changed: vm.residency.enter(cpu, index) })
    }
}

impl<M: Machine> Hypervisor<M> {
    /// Runs a vCPU until its next exit. `values` are what its last exit asked for.
    ///
    /// # Errors
    /// As `claim`; `Again` if the vCPU is off.
    #[inline(never)]
    pub(crate) fn vcpu_run(&self, cpu: usize, vm: VmHandle, vcpu: u64, values: [u64; 4]) -> HostResult {
        let (mut claim, entry) = match self.claim_if(vm, vcpu, |vm, index| Entry::of(vm, cpu, index)) {
            Ok(claimed) => claimed,
            Err(error) => return HostResult::refused(error),
        };
        // Words, not an `Exit`: of that the bytes that mean nothing would come along.
        let mut words = [0; EXIT_WORDS];
        self.machine().on_guest_stack(|| {
            self.run_claimed(&mut claim, entry, values).write(&mut words);
        });
        self.unclaim(claim);
        HostResult { outcome: Ok(()), values: words }
    }

    /// Runs a claimed vCPU until its next exit. From the claim on until it is given back a machine that goes down waits,
    /// and then zeroes the stack that this is on.
    #[inline]
    fn run_claimed(&self, claim: &mut Claim, entry: Entry, values: [u64; 4]) -> Exit {
        if entry.starts
            && let Some(Start { pc, context_id }) =
                self.with_vm(claim.handle, |vm| vm.take_start(claim.index))
        {
            claim.vcpu.reset(pc, context_id);
        }
        if entry.changed {
            self.machine().forget_vcpu(claim.id);
        }
        match self.settle(claim, values) {
            Some(exit) => exit,
            None => self.run_loaded(claim),
        }
    }

    /// Takes the host's word that the pages of a pending unshare are unmapped, and ends the request. The
    /// pages done are in the result: 0 if a page was no longer shared, which the guest is told.
    ///
    /// # Errors
    /// As `claim`; `Permission` if no request is pending; lacking pages, with it still pending.
    #[inline(never)]
    pub(crate) fn unshare_ack(&self, vm: VmHandle, vcpu: u64) -> HostResult {
        let result = self.with_claim(vm, vcpu, |claim| match claim.vcpu.pending {
            Pending::Unshare(pages) => Ok(self.commit_unshare(claim, pages)),
            _ => Err(Error::Permission),
        });
        match result {
            Ok(Unshare::Done(pages)) => HostResult::ok(&[pages]),
            Ok(Unshare::Lacking(lacking)) => HostResult::lacking(lacking.pool, lacking.pages),
            Err(error) => HostResult::refused(error),
        }
    }

    /// Makes a vCPU the VM's boot vCPU.
    ///
    /// # Errors
    /// As `claim`; `Exists` if the VM has one; `Invalid` for an entry that is no instruction address.
    #[inline(never)]
    pub(crate) fn vcpu_set_boot(&self, vm: VmHandle, vcpu: u64, pc: u64, x0: u64) -> HostResult {
        if pc & 3 != 0 {
            return HostResult::refused(Error::Invalid);
        }
        let claimed = self.claim_if(vm, vcpu, |vm, index| {
            if !power::is_fresh(&vm.power) {
                return Err(Error::Exists);
            }
            *vm.power.get_mut(index).ok_or(Error::NoEntry)? = Power::On;
            Ok(())
        });
        unit(claimed.map(|(mut claim, ())| {
            claim.vcpu.set_boot(pc, x0);
            self.unclaim(claim);
        }))
    }

    /// Reads a register of a vCPU that is not protected.
    ///
    /// # Errors
    /// As `claim` and [`Vcpu::register`](super::vcpu::Vcpu::register).
    #[inline(never)]
    pub(crate) fn vcpu_get_reg(&self, vm: VmHandle, vcpu: u64, register: u64) -> HostResult {
        match self.with_claim(vm, vcpu, |claim| claim.vcpu.register(register)) {
            Ok(value) => HostResult::ok(&[value]),
            Err(error) => HostResult::refused(error),
        }
    }

    /// Writes a register of a vCPU that is not protected.
    ///
    /// # Errors
    /// As `claim` and [`Vcpu::set_register`](super::vcpu::Vcpu::set_register).
    #[inline(never)]
    pub(crate) fn vcpu_set_reg(&self, vm: VmHandle, vcpu: u64, register: u64, value: u64) -> HostResult {
        unit(self.with_claim(vm, vcpu, |claim| claim.vcpu.set_register(register, value)))
    }

    fn with_claim<R>(
        &self,
        vm: VmHandle,
        vcpu: u64,
        f: impl FnOnce(&mut Claim) -> Result<R, Error>,
    ) -> Result<R, Error> {
        let mut claim = self.claim(vm, vcpu)?;
        let result = f(&mut claim);
        self.unclaim(claim);
        result
    }

    /// Does what the last exit left to be done. An exit if it still cannot be.
    fn settle(&self, claim: &mut Claim, values: [u64; 4]) -> Option<Exit> {
        match claim.vcpu.pending {
            Pending::None => return None,
            Pending::Mmio(access) => {
                // Memory that has come, or was taken by force, meanwhile: the instruction runs again and
                // meets it. No page with memory ever becomes a device.
                let page = self.guest_page(claim.handle, Gfn::containing(access.ipa));
                if matches!(page, GuestPage::Missing | GuestPage::Device) {
                    let [value, ..] = values;
                    access.complete(&mut claim.vcpu.context, value);
                }
            }
            Pending::GuestCall => set_answer(&mut claim.vcpu, values),
            Pending::Unshare(pages) => {
                return match self.commit_unshare(claim, pages) {
                    Unshare::Done(_) => None,
                    Unshare::Lacking(lacking) => {
                        Some(Exit::NeedPages { pool: lacking.pool, pages: lacking.pages })
                    }
                };
            }
        }
        claim.vcpu.pending = Pending::None;
        None
    }

    /// Ends a pending unshare: checks the whole range against the present state of the tables, takes the
    /// host's access away and gives the guest its result. The range lies in one table, so that it is taken
    /// back whole or not at all.
    fn commit_unshare(&self, claim: &mut Claim, pages: Pages<Gfn>) -> Unshare {
        let done = match self.guest_unshare_host(claim.handle, pages) {
            Ok(done) => done,
            Err(ownership::Error::Lacking(lacking)) => return Unshare::Lacking(lacking),
            Err(_) => 0,
        };
        claim.vcpu.pending = Pending::None;
        set_answer(&mut claim.vcpu, range_answer(done));
        Unshare::Done(done)
    }

    /// Puts the vCPU on this CPU and runs it until there is something for the host.
    fn run_loaded(&self, claim: &mut Claim) -> Exit {
        Counters::count(&self.counters.guest_entries);
        let machine = self.machine();
        let id = claim.id;
        machine.load(id, &mut claim.vcpu.context);
        loop {
            // Another vCPU may have ended the VM, or the machine may go down, since the last turn.
            if !self.may_enter(claim) {
                machine.unload(&mut claim.vcpu.context);
                return Exit::Interrupted;
            }
            let trap = machine.run(id, &mut claim.vcpu.context);
            match self.serve(claim, trap) {
                Step::Resume => {}
                Step::Inject(exception) => {
                    // Its EL1 registers are in the CPU's: put them where they can be changed.
                    machine.unload(&mut claim.vcpu.context);
                    let features = guest_state(|register| machine.id_register(register));
                    exception.deliver(&mut claim.vcpu.context, features);
                    machine.load(id, &mut claim.vcpu.context);
                }
                Step::Exit(exit) => {
                    machine.unload(&mut claim.vcpu.context);
                    if let Trap::SError { esr } = trap {
                        machine.pend_serror(esr);
                    }
                    return exit;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::Ordering;
    use crate::testing::{RAM_START, World};
    use crate::vm::context::{Context, pstate};
    use crate::vm::testing::*;
    use crate::vm::trap::class;
    use abi::guest::INVALID_PARAMETER;
    use abi::host::{HostCall, register};
    use abi::smccc::{NOT_SUPPORTED, SUCCESS};
    use abi::{VmFlags, guest, psci, smccc};

    #[test]
    fn the_boot_vcpu_starts_where_the_host_said_and_nowhere_else() {
        let (world, vm) = booted(ASK_FIRST);
        guest(&world, |context| {
            assert_eq!(
                (context.pc, context.x(0), context.x(1), context.pstate),
                (ENTRY, 7, 0, pstate::RESET)
            );
            Trap::Irq
        });
        assert_eq!(run(&world, vm), Exit::Interrupted);
        for vcpu in 0..2 {
            let again = world.call(HostCall::VcpuSetBoot { vm, vcpu, pc: 0, x0: 0 });
            assert_eq!(again.outcome, Err(Error::Exists));
        }
        assert_eq!(run_with(&world, vm, 1, [0; 4]), Err(Error::Again));
        assert_eq!(run_with(&world, vm, 2, [0; 4]), Err(Error::NoEntry));
    }

    #[test]
    fn translations_of_another_vcpu_are_dropped_on_the_cpu_that_a_vcpu_enters() {
        let (world, vm) = booted(ASK_FIRST);
        calls(&world, psci::CPU_ON, [1, ENTRY, 0]);
        assert_eq!(run(&world, vm), Exit::CpuOn { vcpu: 1 });
        let other = world.vm(ASK_FIRST, 0x1100, 16);
        world.ok(HostCall::VcpuCreate { vm: other, vcpu: 0 });
        world.ok(HostCall::VcpuSetBoot { vm: other, vcpu: 0, pc: ENTRY, x0: 0 });
        let vmid = world.guest(vm).vmid;
        assert_eq!(world.hyp.machine().take_forgotten(), []);
        for (cpu, of, vcpu, forgotten) in [
            (0, vm, 0, vec![]),
            (0, vm, 1, vec![(0, vmid)]),
            (0, vm, 1, vec![]),
            (1, vm, 0, vec![]),
            (0, other, 0, vec![]),
            (0, vm, 0, vec![(0, vmid)]),
            (1, vm, 1, vec![(1, vmid)]),
        ] {
            let entered = world.call_on(cpu, HostCall::VcpuRun { vm: of, vcpu, values: [0; 4] });
            assert_eq!(entered.outcome, Ok(()));
            assert_eq!(
                world.hyp.machine().take_forgotten(),
                forgotten,
                "vCPU {vcpu} of {of:?} enters CPU {cpu}"
            );
        }
    }

    #[test]
    fn a_vcpu_that_the_guest_turns_on_starts_from_reset_at_the_guests_entry() {
        let (world, vm) = booted(ASK_FIRST);
        calls(&world, psci::CPU_ON, [1, RAM + 0x1000, 9]);
        assert_eq!(run(&world, vm), Exit::CpuOn { vcpu: 1 });
        guest(&world, |context| {
            assert_eq!((context.pc, context.x(0)), (RAM + 0x1000, 9));
            assert_eq!(context.el1.vmpidr_el2, 1 << 31 | 1);
            context.set_x(0, u64::from(psci::CPU_OFF));
            sync(class::HVC64, 0)
        });
        assert_eq!(run_with(&world, vm, 1, [0; 4]), Ok(Exit::CpuOff));
        assert_eq!(run_with(&world, vm, 1, [0; 4]), Err(Error::Again));
        finds(&world, [psci::SUCCESS, 0, 0, 0]);
        assert_eq!(run(&world, vm), Exit::Interrupted);
    }

    #[test]
    fn an_serror_that_ends_a_stay_is_made_pending_for_the_host_once() {
        let (world, vm) = booted(ASK_FIRST);
        let esr = 0x2f << 26 | IL | 0x11;
        guest(&world, move |_| Trap::SError { esr });
        assert_eq!(run(&world, vm), Exit::SError);
        assert_eq!(world.hyp.machine().take_serrors(), [esr]);
        guest(&world, |context| {
            assert_eq!((context.pc, context.el1.esr_el1), (ENTRY, 0), "the guest knows nothing of it");
            Trap::Irq
        });
        assert_eq!(run(&world, vm), Exit::Interrupted);
        assert_eq!(world.hyp.machine().take_serrors(), []);
    }

    #[test]
    fn an_unshare_asks_and_the_acknowledgement_takes_the_page_back() {
        let (world, vm) = sharing(ASK_FIRST);
        calls(&world, guest::MEM_UNSHARE, [RAM, 1, 0]);
        assert_eq!(run(&world, vm), Exit::Unshare { ipa: RAM, pages: 1 });
        assert!(world.host_reads(0x100), "not before the acknowledgement");
        assert_eq!(world.ok(HostCall::UnshareAck { vm, vcpu: 0 }), 1);
        assert!(!world.host_reads(0x100));
        let again = world.call(HostCall::UnshareAck { vm, vcpu: 0 });
        assert_eq!(again.outcome, Err(Error::Permission), "consumed once");
        finds(&world, [SUCCESS, 1, 0, 0]);
        assert_eq!(run(&world, vm), Exit::Interrupted);
        world.check();
    }

    #[test]
    fn a_run_with_an_unshare_pending_takes_the_page_back_first() {
        let (world, vm) = sharing(ASK_FIRST);
        calls(&world, guest::MEM_UNSHARE, [RAM, 0, 0]);
        assert_eq!(run(&world, vm), Exit::Unshare { ipa: RAM, pages: 1 });
        finds(&world, [SUCCESS, 1, 0, 0]);
        assert_eq!(run(&world, vm), Exit::Interrupted);
        assert!(!world.host_reads(0x100));
    }

    #[test]
    fn an_unshare_that_lacks_tables_stays_pending_until_there_are_some() {
        let world = World::new();
        let vm = world.vm(ASK_FIRST, 0x1000, 1);
        world.ok(HostCall::VcpuCreate { vm, vcpu: 0 });
        world.ok(HostCall::VcpuSetBoot { vm, vcpu: 0, pc: ENTRY, x0: 0 });
        world.ok(HostCall::DonateGuest { vm, pfn: RAM_START, gfn: RAM >> 12, pages: 0x200 });
        calls(&world, guest::MEM_SHARE, [RAM, 0x200, 0]);
        finds(&world, [SUCCESS, 0x200, 0, 0]);
        assert_eq!(run(&world, vm), Exit::Interrupted);
        calls(&world, guest::MEM_UNSHARE, [RAM, 1, 0]);
        assert_eq!(run(&world, vm), Exit::Unshare { ipa: RAM, pages: 1 });
        let pool = abi::page::Pool::Vm;
        let lacking = HostResult::lacking(pool, 1);
        assert_eq!(world.call(HostCall::UnshareAck { vm, vcpu: 0 }), lacking);
        assert_eq!(run(&world, vm), Exit::NeedPages { pool, pages: 1 });
        assert_eq!(world.call(HostCall::UnshareAck { vm, vcpu: 0 }), lacking);
        assert!(world.host_reads(0) && world.host_reads(1), "nothing has changed");
        world.ok(HostCall::VmTopUp { vm, pfn: RAM_START + 0x1010, pages: 1 });
        finds(&world, [SUCCESS, 1, 0, 0]);
        assert_eq!(run(&world, vm), Exit::Interrupted);
        assert!(!world.host_reads(0) && world.host_reads(1));
        world.check();
    }

    #[test]
    fn a_page_that_is_not_shared_any_more_is_not_unshared_twice() {
        let (world, vm) = sharing(ASK_FIRST);
        calls(&world, psci::CPU_ON, [1, ENTRY, 0]);
        assert_eq!(run(&world, vm), Exit::CpuOn { vcpu: 1 });
        for vcpu in 0..2 {
            calls(&world, guest::MEM_UNSHARE, [RAM, 1, 0]);
            assert_eq!(run_with(&world, vm, vcpu, [0; 4]), Ok(Exit::Unshare { ipa: RAM, pages: 1 }));
        }
        assert_eq!(world.ok(HostCall::UnshareAck { vm, vcpu: 1 }), 1);
        assert_eq!(world.ok(HostCall::UnshareAck { vm, vcpu: 0 }), 0);
        finds(&world, [INVALID_PARAMETER, 0, 0, 0]);
        assert_eq!(run(&world, vm), Exit::Interrupted);
        finds(&world, [SUCCESS, 1, 0, 0]);
        assert_eq!(run_with(&world, vm, 1, [0; 4]), Ok(Exit::Interrupted));
    }

    #[test]
    fn an_unprotected_guest_has_no_memory_calls_and_its_host_sees_everything() {
        let (world, vm) = booted(VmFlags::default());
        calls(&world, guest::MEM_SHARE, [RAM, 1, 0]);
        finds(&world, [NOT_SUPPORTED, 0, 0, 0]);
        assert_eq!(run(&world, vm), Exit::Interrupted);
        assert_eq!(world.ok(HostCall::VcpuGetReg { vm, vcpu: 0, register: register::PC }), ENTRY + 4);
        world.ok(HostCall::VcpuSetReg { vm, vcpu: 0, register: 3, value: 33 });
        guest(&world, |context| {
            assert_eq!(context.x(3), 33);
            context.pc = ENTRY;
            abort(class::DATA_ABORT, ISV | TRANSLATION_3, DEVICE)
        });
        assert!(matches!(run(&world, vm), Exit::Mmio { ipa: DEVICE, .. }));
        let (world, vm) = booted(ASK_FIRST);
        let read = world.call(HostCall::VcpuGetReg { vm, vcpu: 0, register: 0 });
        assert_eq!(read.outcome, Err(Error::Permission));
    }

    #[test]
    fn no_trap_makes_the_loop_panic() {
        let (world, vm) = booted(VmFlags { mmio_unguarded: true, ..ASK_FIRST });
        donate(&world, vm, 0x100, RAM);
        let mut state = 1u64;
        for _ in 0..20_000 {
            // xorshift64: any trap that hardware could report, and some that it could not.
            let mut random = || {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state
            };
            let (esr, far, hpfar) = (random(), random(), random());
            let x: [u64; 31] = core::array::from_fn(|_| random());
            let number = random() as u32;
            let function =
                [guest::MEM_SHARE, guest::MEM_UNSHARE, guest::MMIO_GUARD_MAP, psci::CPU_ON, number];
            let function = function[random() as usize % function.len()];
            let class =
                [class::DATA_ABORT, class::HVC64, class::SYSREG, esr >> 26 & 0x3f][random() as usize % 4];
            guest(&world, move |context| {
                context.x = x;
                context.set_x(0, u64::from(function));
                context.set_x(1, x[1] & !0xfff);
                context.pstate = pstate::RESET;
                let esr = class << 26 | esr & 0x1ff_ffff & if class == class::HVC64 { !0xffff } else { !0 };
                Trap::Sync { esr, far, hpfar }
            });
            match run_with(&world, vm, 0, [0; 4]) {
                Ok(_) => {}
                Err(Error::Permission) => {
                    world.hyp.vms.revive(vm);
                    world.hyp.with_vm(vm, |vm| vm.power[0] = Power::On);
                }
                Err(Error::Again) => {
                    world.hyp.with_vm(vm, |vm| vm.power[0] = Power::On);
                }
                Err(error) => panic!("{error:?}"),
            }
        }
        world.check();
    }

    /// vCPU 0 runs; meanwhile, as if on another CPU, `event` happens; then the guest makes a call that EL2
    /// answers. Whether the guest was entered again behind it.
    fn is_entered_again_after(event: impl FnOnce(&World, VmHandle) + Send + 'static) -> bool {
        let (world, vm) = booted(ASK_FIRST);
        let world: &'static World = Box::leak(Box::new(world));
        calls(world, psci::CPU_ON, [1, ENTRY, 0]);
        assert_eq!(run_with(world, vm, 0, [0; 4]), Ok(Exit::CpuOn { vcpu: 1 }));
        let mut event = Some(event);
        guest(world, move |context| {
            if let Some(event) = event.take() {
                event(world, vm);
            }
            context.set_x(0, u64::from(smccc::VERSION));
            sync(class::HVC64, 0)
        });
        let again = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let seen = again.clone();
        let mark = move |_: &mut Context| {
            seen.store(true, Ordering::SeqCst);
            Trap::Irq
        };
        guest(world, mark);
        assert_eq!(run_with(world, vm, 0, [0; 4]), Ok(Exit::Interrupted));
        again.load(Ordering::SeqCst)
    }

    #[test]
    fn a_guest_is_entered_again_behind_a_call_that_el2_answers() {
        assert!(is_entered_again_after(|_, _| {}));
    }

    #[test]
    fn no_guest_is_entered_once_the_machine_goes_down() {
        assert!(!is_entered_again_after(|world, _| world.hyp.close()));
    }

    #[test]
    fn nothing_of_an_ended_vm_is_entered_again() {
        assert!(!is_entered_again_after(|world, vm| {
            let claim = world.hyp.claim(vm, 1).unwrap();
            world.hyp.vms.end(&claim);
            world.hyp.unclaim(claim);
        }));
    }
}
