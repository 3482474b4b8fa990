//! Running a vCPU: from the host's call to the exit that it returns, a loop over typed traps.
//!
//! The vCPU is claimed for all of it, so nobody else touches its record; the VM's own state (power states,
//! whether it has ended) is behind the VM's lock, which is taken for single questions and never held while a
//! guest runs. What EL2 can answer it answers with the guest still loaded; an exit to the host carries what
//! [`abi::exit`] says and nothing else (invariant I10), and no value of the guest or of the host can make
//! this loop panic or go on for ever without an interrupt getting through (I8): every turn enters the guest,
//! and an entry with an interrupt pending is an exit.

use crate::Hypervisor;
use crate::addr::{Gfn, Pages};
use crate::call::unit;
use crate::hypervisor::Counters;
use crate::machine::Machine;
use crate::ownership;
use crate::ownership::query::GuestPage;
use crate::vm::guest_call::{Answer, GuestCall, Request, answer, first_chunk};
use crate::vm::inject::{Exception, guest_state};
use crate::vm::power::{self, Outcome, Power, Start};
use crate::vm::vcpu::{Pending, Vcpu};
use crate::vm::{Claim, Vm, context::Trap, context::pstate, mmio, sysreg};
use crate::watch::{Answer as Told, Asked, Held, Watch};
use abi::exit::{Access, EXIT_WORDS, Exit, Fatal};
use abi::guest::INVALID_PARAMETER;
use abi::host::HostResult;
use abi::smccc::{NOT_SUPPORTED, SUCCESS};
use abi::{Error, VmHandle, psci};

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
mod class {
    pub(super) const UNKNOWN: u64 = 0x00;
    pub(super) const WFX: u64 = 0x01;
    pub(super) const FP: u64 = 0x07;
    pub(super) const PAUTH: u64 = 0x09;
    pub(super) const LD64B: u64 = 0x0a;
    pub(super) const SYSREG_128: u64 = 0x14;
    pub(super) const HVC64: u64 = 0x16;
    pub(super) const SMC64: u64 = 0x17;
    pub(super) const SYSREG: u64 = 0x18;
    pub(super) const SVE: u64 = 0x19;
    pub(super) const SME: u64 = 0x1d;
    pub(super) const INSTRUCTION_ABORT: u64 = 0x20;
    pub(super) const DATA_ABORT: u64 = 0x24;
}

/// What follows from a trap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// The guest goes on.
    Resume,
    /// The guest takes an exception.
    Inject(Exception),
    /// The host must do something.
    Exit(Exit),
}

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
    /// As `claim` and [`Vcpu::register`].
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
    /// As `claim` and [`Vcpu::set_register`].
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

    /// Decides what follows from a trap.
    fn serve(&self, claim: &mut Claim, trap: Trap) -> Step {
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

    /// Serves an HVC with immediate 0.
    fn guest_call(&self, claim: &mut Claim) -> Step {
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

/// The page of an HPFAR_EL2 value; `None` beyond what a stage 2 of 4 KiB pages can translate.
fn fault_page(hpfar: u64) -> Option<Gfn> {
    const FIPA_SHIFT: u32 = 4;
    const FIPA_BITS: u64 = (1 << 40) - 1;
    Gfn::new(hpfar >> FIPA_SHIFT & FIPA_BITS)
}

/// The answer of a call about a range: success if anything was done, which x1 says.
fn range_answer(done: u64) -> Answer {
    match done {
        0 => answer(INVALID_PARAMETER),
        done => [SUCCESS, done, 0, 0],
    }
}

fn set_answer(vcpu: &mut Vcpu, answer: Answer) {
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
    use crate::sync::Ordering;
    use crate::testing::{RAM_START, World};
    use crate::vm::context::Context;
    use abi::host::{HostCall, register};
    use abi::{HostState, VmFlags, guest, smccc};

    const RAM: u64 = 0x8000_0000;
    const DEVICE: u64 = 0x0900_0000;
    const ENTRY: u64 = RAM + 0x40;

    const ASK_FIRST: VmFlags = VmFlags { protected: true, unshare_immediate: false, mmio_unguarded: false };
    const IL: u64 = 1 << 25;
    const ISV: u64 = 1 << 24;
    const TRANSLATION_3: u64 = 0b00_0111;

    /// A VM with two vCPUs, the first of which was chosen to boot.
    fn booted(flags: VmFlags) -> (World, VmHandle) {
        let world = World::new();
        let vm = world.vm(flags, 0x1000, 16);
        for vcpu in 0..2 {
            world.ok(HostCall::VcpuCreate { vm, vcpu });
        }
        world.ok(HostCall::VcpuSetBoot { vm, vcpu: 0, pc: ENTRY, x0: 7 });
        (world, vm)
    }

    /// The guest's next run does this.
    fn guest(world: &World, step: impl FnMut(&mut Context) -> Trap + Send + 'static) {
        world.hyp.machine().push_step(step);
    }

    fn sync(class: u64, iss: u64) -> Trap {
        Trap::Sync { esr: class << 26 | IL | iss, far: 0, hpfar: 0 }
    }

    /// The guest's next run makes a call from its entry.
    fn calls(world: &World, function: u32, arguments: [u64; 3]) {
        guest(world, move |context| {
            context.set_x(0, u64::from(function));
            for (register, value) in (1..).zip(arguments) {
                context.set_x(register, value);
            }
            context.pc = ENTRY + 4;
            sync(class::HVC64, 0)
        });
    }

    /// The guest's next run finds these results in x0 to x3, behind its call; then an interrupt arrives.
    fn finds(world: &World, results: [u64; 4]) {
        guest(world, move |context| {
            assert_eq!((context.x[..4].to_vec(), context.pc), (results.to_vec(), ENTRY + 4));
            Trap::Irq
        });
    }

    fn abort(class: u64, iss: u64, address: u64) -> Trap {
        Trap::Sync { esr: class << 26 | IL | iss, far: address, hpfar: address >> 12 << 4 }
    }

    /// The guest's next run touches an address, with this syndrome.
    fn touches(world: &World, iss: u64, address: u64) {
        guest(world, move |context| {
            context.pc = ENTRY;
            context.set_x(5, 0x1122_3344_5566_7788);
            abort(class::DATA_ABORT, iss, address)
        });
    }

    /// The guest's next run finds itself in its handler for an exception of this class and status.
    fn handles(world: &World, esr: u64) {
        guest(world, move |context| {
            assert_eq!((context.el1.esr_el1, context.el1.elr_el1, context.pc), (esr, ENTRY, 0x200));
            assert_eq!(context.pstate, pstate::RESET);
            Trap::Irq
        });
    }

    fn run_with(world: &World, vm: VmHandle, vcpu: u64, values: [u64; 4]) -> Result<Exit, Error> {
        let result = world.call(HostCall::VcpuRun { vm, vcpu, values });
        result.outcome.map(|()| Exit::from_words(result.values).unwrap())
    }

    fn run(world: &World, vm: VmHandle) -> Exit {
        run_with(world, vm, 0, [0; 4]).unwrap()
    }

    fn donate(world: &World, vm: VmHandle, page: u64, address: u64) {
        world.ok(HostCall::DonateGuest { vm, pfn: RAM_START + page, gfn: address >> 12, pages: 1 });
    }

    /// A VM that shares RAM page 0x100 with the host, at its first page.
    fn sharing(flags: VmFlags) -> (World, VmHandle) {
        let (world, vm) = booted(flags);
        donate(&world, vm, 0x100, RAM);
        calls(&world, guest::MEM_SHARE, [RAM, 1, 0]);
        finds(&world, [SUCCESS, 1, 0, 0]);
        assert_eq!(run(&world, vm), Exit::Interrupted);
        assert_eq!(world.host_state(0x100), Some(HostState::SharedBorrowed));
        (world, vm)
    }

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
