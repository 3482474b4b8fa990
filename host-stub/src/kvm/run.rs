//! `KVM_RUN`: runs a vCPU until its program has something to do.
//!
//! A chain of entries: [`begin`] makes the first, and [`Entry::end`] makes of what EL2 answers the next, or the result.
//! The call itself is made by whoever holds the entry, so that the kernel can serve others meanwhile. Most exits are
//! served here and the vCPU goes on; the rest become exits of KVM.

use alloc::rc::Rc;
use core::ops::Range;

use abi::host::{HostResult, register};
use abi::page::Pool;
use abi::smccc::NOT_SUPPORTED;
use abi::{Exit, HostCall};

use super::memory::{Caller, Missing, give_page};
use super::run_page::{RunExit, RunPage, SUBERROR_FATAL, SYSTEM_EVENT_RESET, SYSTEM_EVENT_SHUTDOWN};
use super::slots::Source;
use super::vm::{Boot, Pending, VcpuRef};
use crate::errno::Errno;
use crate::host::{Host, Misbehaviour};
use crate::mm::PAGE;

/// A vCPU that is to be entered. While there is one, no other thread has the vCPU.
#[derive(Debug)]
pub struct Entry {
    vcpu: VcpuRef,
    values: [u64; 4],
}

/// What comes after an entry.
#[derive(Debug)]
pub enum Step {
    /// Another one.
    Enter(Entry),
    /// Another one, after an interrupt: others may have their turn.
    Yield(Entry),
    /// Another one, when something has happened: the guest waits.
    Wait(Entry),
    /// The vCPU is off: EAGAIN, or another entry when something has happened.
    Off(Entry),
    /// The result of `KVM_RUN`.
    Return(Result<u64, Errno>),
}

impl Drop for Entry {
    fn drop(&mut self) {
        // A vCPU stays in its VM.
        let _ = self.vcpu.with(|vcpu| vcpu.in_use.set(false));
    }
}

/// What to do after an exit.
enum Next {
    /// Run on, with these values.
    Again([u64; 4]),
    /// Run on after an interrupt.
    Yield,
    /// Run on when something has happened.
    Wait,
    /// The vCPU is off.
    Off,
    /// Return to the program.
    Return(RunExit, Result<(), Errno>),
}

const AGAIN: Result<Next, Errno> = Ok(Next::Again([0; 4]));

/// Begins to run a vCPU, which no thread has. The exit will be in its `kvm_run`; an error leaves `kvm_run` as it was, but
/// for EFAULT of a memory fault and EINTR of an interruption.
pub fn begin(host: &mut Host, caller: &mut dyn Caller, vcpu: &VcpuRef) -> Result<Entry, Errno> {
    if !vcpu.with(|vcpu| vcpu.initialised.get())? {
        return Err(Errno::ENOEXEC);
    }
    let values = complete_pending(host, caller, vcpu)?;
    if page(host, vcpu).immediate_exit()? {
        return Err(Errno::EINTR);
    }
    start(host, caller, vcpu)?;
    vcpu.with(|vcpu| vcpu.in_use.set(true))?;
    Ok(Entry { vcpu: vcpu.clone(), values })
}

impl Entry {
    /// The VM.
    pub fn vm(&self) -> &Rc<super::Vm> {
        self.vcpu.vm()
    }

    /// The call that enters.
    pub fn call(&self) -> HostCall {
        HostCall::VcpuRun { vm: self.vcpu.vm().handle(), vcpu: self.vcpu.id(), values: self.values }
    }

    /// The entry was made, and EL2 answered this; `None`: nothing that is a result.
    pub fn end(mut self, host: &mut Host, caller: &mut dyn Caller, result: Option<HostResult>) -> Step {
        match self.next(host, caller, result) {
            Ok(Next::Again(values)) => {
                self.values = values;
                Step::Enter(self)
            }
            Ok(Next::Yield) => {
                self.values = [0; 4];
                Step::Yield(self)
            }
            Ok(Next::Wait) => {
                self.values = [0; 4];
                Step::Wait(self)
            }
            Ok(Next::Off) => Step::Off(self),
            Ok(Next::Return(exit, outcome)) => {
                let written = page(host, &self.vcpu).write_exit(exit);
                Step::Return(written.and(outcome).map(|()| 0))
            }
            Err(error) => Step::Return(Err(error)),
        }
    }

    /// The entry is not made, because of a signal: EINTR.
    pub fn interrupted(self, host: &Host) -> Result<u64, Errno> {
        page(host, &self.vcpu).write_exit(RunExit::Interrupted)?;
        Err(Errno::EINTR)
    }

    fn next(
        &self,
        host: &mut Host,
        caller: &mut dyn Caller,
        result: Option<HostResult>,
    ) -> Result<Next, Errno> {
        let HostResult { outcome, values } = result.ok_or(Errno::EIO)?;
        match outcome {
            Ok(()) => (),
            Err(abi::Error::NoMemory) => {
                let [pages, pool, ..] = values;
                self.vcpu.vm().supply(host, Pool::from_word(pool).ok_or(Errno::EIO)?, pages)?;
                return Ok(Next::Again(self.values));
            }
            Err(abi::Error::Again) => return Ok(Next::Off),
            // Another vCPU has turned the guest off: as in KVM, this one never goes on.
            Err(abi::Error::Permission) if self.vcpu.vm().ended.get() && !caller.is_single_threaded() => {
                return Ok(Next::Off);
            }
            Err(error) => return Err(error.into()),
        }
        self.vcpu.with(|vcpu| vcpu.pending.set(Pending::None))?;
        serve(host, caller, &self.vcpu, Exit::from_words(values).ok_or(Errno::EIO)?)
    }
}

fn page<'m>(host: &Host<'m>, vcpu: &VcpuRef) -> RunPage<'m> {
    RunPage::new(host.machine, vcpu.run_page())
}

/// Does what must come before the next run, and returns its values: of an MMIO load, what the program left.
/// They stay pending until EL2 has taken them.
fn complete_pending(host: &mut Host, caller: &mut dyn Caller, vcpu: &VcpuRef) -> Result<[u64; 4], Errno> {
    match vcpu.with(|vcpu| vcpu.pending.get())? {
        Pending::None => Ok([0; 4]),
        Pending::Answer(values) => Ok(values),
        Pending::Load { size } => Ok([page(host, vcpu).mmio_value(size)?, 0, 0, 0]),
        Pending::Unshare { ipa, pages } => {
            serve_unshare(host, caller, vcpu, ipa, pages)?;
            vcpu.with(|vcpu| vcpu.pending.set(Pending::None))?;
            Ok([0; 4])
        }
    }
}

/// Before a VM's first run, tells EL2 which vCPU boots, and where: for a protected VM that is vCPU 0 with the
/// entry that it was given; for another, whichever runs first, with the registers that it has.
fn start(host: &mut Host, caller: &dyn Caller, vcpu: &VcpuRef) -> Result<(), Errno> {
    let vm = vcpu.vm();
    if vm.started.get() {
        return Ok(());
    }
    let (handle, id) = (vm.handle(), vcpu.id());
    let Boot { pc, x0 } = if vm.is_protected() {
        if id != 0 {
            // It is off until vCPU 0 turns it on, which another thread may run.
            return if caller.is_single_threaded() { Err(Errno::EAGAIN) } else { Ok(()) };
        }
        vcpu.with(|vcpu| vcpu.boot.get())?
    } else {
        let read = |register| {
            let [value, ..] = host.call(HostCall::VcpuGetReg { vm: handle, vcpu: id, register })?.values;
            Ok::<u64, Errno>(value)
        };
        Boot { pc: read(register::PC)?, x0: read(0)? }
    };
    vm.call(host, HostCall::VcpuSetBoot { vm: handle, vcpu: id, pc, x0 })?;
    vm.started.set(true);
    Ok(())
}

fn serve(host: &mut Host, caller: &mut dyn Caller, vcpu: &VcpuRef, exit: Exit) -> Result<Next, Errno> {
    let vm = vcpu.vm();
    match exit {
        Exit::Interrupted => {
            host.machine.take_interrupts();
            returns_or(Next::Yield, host, caller, vcpu)
        }
        Exit::Wait { .. } => returns_or(Next::Wait, host, caller, vcpu),
        Exit::MissingPage { ipa, .. } => serve_missing(host, caller, vcpu, ipa),
        Exit::Mmio { ipa, .. } if vm.slots.borrow().find(ipa / PAGE).is_some() => {
            // Memory that the guest has not touched before, in a VM whose every unbacked access is handed
            // out: it becomes memory, and the guest repeats the access.
            serve_missing(host, caller, vcpu, ipa)
        }
        Exit::Mmio { ipa, size, write, value } => {
            let pending = if write { Pending::None } else { Pending::Load { size } };
            vcpu.with(|vcpu| vcpu.pending.set(pending))?;
            let exit = RunExit::Mmio {
                address: ipa,
                data: if write { value.to_le_bytes() } else { [0; 8] },
                length: size.into(),
                is_write: write,
            };
            Ok(Next::Return(exit, Ok(())))
        }
        Exit::Unshare { ipa, pages } => serve_unshare(host, caller, vcpu, ipa, pages),
        Exit::NeedPages { pool, pages } => {
            vm.supply(host, pool, pages)?;
            AGAIN
        }
        // The only call that EL2 forwards is PTP, and there is no clock to serve.
        Exit::GuestCall { .. } => {
            let answer = [NOT_SUPPORTED, 0, 0, 0];
            vcpu.with(|vcpu| vcpu.pending.set(Pending::Answer(answer)))?;
            Ok(Next::Again(answer))
        }
        Exit::SystemOff => system_event(vm, SYSTEM_EVENT_SHUTDOWN),
        Exit::SystemReset => system_event(vm, SYSTEM_EVENT_RESET),
        Exit::CpuOn { vcpu: other } => {
            log::debug!("{:?} turned vCPU {other} on", vm.handle());
            vm.others_on.set(vm.others_on.get().saturating_add(1));
            returns_or(Next::Again([0; 4]), host, caller, vcpu)
        }
        Exit::CpuOff => {
            vm.others_on.set(vm.others_on.get().saturating_sub(1));
            Ok(Next::Off)
        }
        Exit::SError | Exit::Fatal(_) => {
            log::error!("{:?} vCPU {}: {exit:?}", vm.handle(), vcpu.id());
            let suberror = SUBERROR_FATAL;
            Ok(Next::Return(RunExit::InternalError { suberror }, Ok(())))
        }
    }
}

fn system_event(vm: &super::Vm, kind: u32) -> Result<Next, Errno> {
    vm.ended.set(true);
    Ok(Next::Return(RunExit::SystemEvent { kind }, Ok(())))
}

/// After a tick or when the guest waits: what comes next, unless the program wants the CPU, or has one thread and another
/// vCPU to run.
fn returns_or(next: Next, host: &Host, caller: &dyn Caller, vcpu: &VcpuRef) -> Result<Next, Errno> {
    let other_has_no_thread = vcpu.vm().others_on.get() > 0 && caller.is_single_threaded();
    if other_has_no_thread || page(host, vcpu).immediate_exit()? {
        return Ok(Next::Return(RunExit::Interrupted, Err(Errno::EINTR)));
    }
    Ok(next)
}

fn serve_missing(host: &mut Host, caller: &mut dyn Caller, vcpu: &VcpuRef, ipa: u64) -> Result<Next, Errno> {
    match give_page(host, caller, vcpu.vm(), ipa) {
        Ok(()) => AGAIN,
        Err(Missing::NoSlot | Missing::Closed) => {
            let address = crate::mm::page_down(ipa);
            Ok(Next::Return(RunExit::MemoryFault { address }, Err(Errno::EFAULT)))
        }
        Err(Missing::Error(error)) => Err(error),
    }
}

/// The guest wants pages back. The gate closes for them, they are unmapped everywhere, and only then EL2
/// hears that it may revoke them.
fn serve_unshare(
    host: &mut Host,
    caller: &mut dyn Caller,
    vcpu: &VcpuRef,
    ipa: u64,
    pages: u64,
) -> Result<Next, Errno> {
    let vm = vcpu.vm();
    let first = ipa / PAGE;
    let content = content_of(vm, first..first.saturating_add(pages));
    for (view, range) in &content {
        view.inode().set_draining(range.clone(), true);
        if !host.misbehaviour.contains(Misbehaviour::ACKNOWLEDGE_WITHOUT_UNMAPPING) {
            caller.unmap_content(host, view.inode(), range);
        }
    }
    if content.iter().any(|(view, range)| view.inode().is_pinned(range.clone())) {
        // The gate stays closed, and EL2 hears nothing until the last pin is gone.
        vcpu.with(|vcpu| vcpu.pending.set(Pending::Unshare { ipa, pages }))?;
        return Err(Errno::EAGAIN);
    }
    let outcome = vm.call(host, HostCall::UnshareAck { vm: vm.handle(), vcpu: vcpu.id() });
    for (view, range) in &content {
        view.inode().set_draining(range.clone(), false);
    }
    host.counters.unshares = host.counters.unshares.saturating_add(1);
    if let Err(error) = outcome {
        log::warn!("{:?}: unshare of {pages} pages at {ipa:#x} not acknowledged: {error:?}", vm.handle());
        return Err(error);
    }
    AGAIN
}

/// The content that a range of guest frames shows, slot by slot.
fn content_of(vm: &super::Vm, frames: Range<u64>) -> alloc::vec::Vec<(Rc<crate::gmem::View>, Range<u64>)> {
    let mut content = alloc::vec::Vec::new();
    let slots = vm.slots.borrow();
    for slot in slots.overlapping(&frames) {
        if let Source::Gmem { view, first } = &slot.source
            && let Some(view) = view.upgrade()
        {
            let page = |gfn: u64| first.saturating_add(gfn.saturating_sub(slot.frames.start));
            let start = frames.start.max(slot.frames.start);
            let end = frames.end.min(slot.frames.end);
            content.push((view, page(start)..page(end)));
        }
    }
    content
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gmem::gate::{self, Intent};
    use crate::mm::{Fault, Holder, Pfn};
    use crate::testing::{Event, FakeMachine, World};
    use abi::HostState;
    use abi::exit::{Access, Fatal};

    const DEVICE: u64 = 0x900_0000;

    fn missing(page: u64) -> Exit {
        Exit::MissingPage { ipa: World::IPA + page * PAGE, access: Access::Write }
    }

    /// Runs once with these exits, the last of which ends the run; returns the result and exit reason.
    fn run(world: &mut World<'_>, machine: &FakeMachine, exits: &[Exit]) -> (Result<u64, Errno>, u32) {
        machine.exits(exits);
        let result = world.run();
        (result, world.run_word(8) as u32)
    }

    #[test]
    fn a_page_is_unmapped_before_it_is_donated() {
        let machine = FakeMachine::new(64);
        let mut world = World::new(&machine, 4);
        let frame = world.touch(1).unwrap();
        machine.events();
        assert_eq!(run(&mut world, &machine, &[missing(1), Exit::SystemOff]), (Ok(0), 24));
        let gfn = World::IPA / PAGE + 1;
        assert_eq!(
            machine.events(),
            [
                Event::Boot { pc: 0, x0: 0 },
                Event::Run(0),
                Event::Flush(World::VA + PAGE),
                Event::Donate { pfn: frame.0, gfn },
                Event::Run(0),
            ]
        );
        assert_eq!(world.touch(1), Err(Fault::NothingThere));
        assert!(matches!(world.host.frames.holder(frame), Some(Holder::Guest { .. })));
    }

    #[test]
    fn lack_of_table_pages_is_supplied_and_the_call_repeated() {
        let machine = FakeMachine::new(64);
        let mut world = World::new(&machine, 4);
        machine.lack_at_donate(3);
        let before = world.host.frames.census().vms;
        assert_eq!(run(&mut world, &machine, &[missing(0), Exit::SystemOff]).0, Ok(0));
        assert_eq!(world.host.frames.census().vms, before + 1 + 3);
        let need = Exit::NeedPages { pool: Pool::Vm, pages: 2 };
        assert_eq!(run(&mut world, &machine, &[need, Exit::SystemOff]).0, Ok(0));
        assert_eq!(world.host.frames.census().vms, before + 1 + 3 + 2);
    }

    #[test]
    fn a_load_gets_what_the_program_left_and_is_completed_once() {
        let machine = FakeMachine::new(64);
        let mut world = World::new(&machine, 4);
        let load = Exit::Mmio { ipa: DEVICE + 8, size: 2, write: false, value: 0 };
        assert_eq!(run(&mut world, &machine, &[load]), (Ok(0), 6));
        assert_eq!(world.run_word(32), DEVICE + 8);
        assert_eq!(world.run_word(48), 2);
        let data = world.vcpu.run_page().address() + 40;
        world.host.machine.store(data, 0x1122_3344_5566_7788).unwrap();
        machine.events();
        assert_eq!(run(&mut world, &machine, &[Exit::Interrupted, Exit::SystemOff]).0, Ok(0));
        assert_eq!(machine.events(), [Event::Run(0x7788), Event::Interrupts, Event::Run(0)]);
        run(&mut world, &machine, &[Exit::SystemOff]).0.unwrap();
        assert_eq!(machine.events(), [Event::Run(0)]);
    }

    #[test]
    fn a_store_shows_its_bytes() {
        let machine = FakeMachine::new(64);
        let mut world = World::new(&machine, 4);
        let store = Exit::Mmio { ipa: DEVICE, size: 4, write: true, value: 0xaabb_ccdd };
        assert_eq!(run(&mut world, &machine, &[store]), (Ok(0), 6));
        assert_eq!(world.run_word(40), 0xaabb_ccdd);
        assert_eq!(world.run_word(48), 1 << 32 | 4);
    }

    #[test]
    fn immediate_exit_does_not_enter_and_keeps_a_pending_load() {
        let machine = FakeMachine::new(64);
        let mut world = World::new(&machine, 4);
        let load = Exit::Mmio { ipa: DEVICE, size: 8, write: false, value: 0 };
        run(&mut world, &machine, &[load]).0.unwrap();
        let page = world.vcpu.run_page().address();
        world.host.machine.store(page + 40, 99).unwrap();
        world.host.machine.write(page + 1, &[1]).unwrap();
        machine.events();
        assert_eq!(world.run(), Err(Errno::EINTR));
        assert!(machine.events().is_empty());
        assert_eq!(world.run_word(8) as u32, 6);
        world.host.machine.write(page + 1, &[0]).unwrap();
        run(&mut world, &machine, &[Exit::SystemOff]).0.unwrap();
        assert_eq!(machine.events(), [Event::Run(99)]);
    }

    /// A world in which the guest shares page 2 and the program has it mapped.
    fn shared<'m>(machine: &'m FakeMachine) -> (World<'m>, Pfn) {
        let mut world = World::new(machine, 4);
        run(&mut world, machine, &[missing(2), Exit::Interrupted, Exit::SystemOff]).0.unwrap();
        let frame = world.frame(2);
        assert_eq!(world.touch(2), Err(Fault::NothingThere));
        machine.set_state(frame, HostState::SharedBorrowed);
        assert_eq!(world.touch(2), Ok(frame));
        machine.events();
        (world, frame)
    }

    const UNSHARE: Exit = Exit::Unshare { ipa: World::IPA + 2 * PAGE, pages: 1 };

    #[test]
    fn an_unshare_is_acknowledged_only_after_the_page_is_unmapped() {
        let machine = FakeMachine::new(64);
        let (mut world, frame) = shared(&machine);
        machine.lack_at_ack(1);
        run(&mut world, &machine, &[UNSHARE, Exit::SystemOff]).0.unwrap();
        let flush = Event::Flush(World::VA + 2 * PAGE);
        assert_eq!(machine.events(), [Event::Run(0), flush, Event::Ack, Event::Run(0)]);
        assert_eq!(world.host.counters.unshares, 1);
        machine.set_state(frame, HostState::NoPage);
        assert_eq!(world.touch(2), Err(Fault::NothingThere));
    }

    #[test]
    fn a_host_told_to_misbehave_acknowledges_with_the_page_mapped() {
        let machine = FakeMachine::new(64);
        let (mut world, _) = shared(&machine);
        world.host.misbehaviour = Misbehaviour::ACKNOWLEDGE_WITHOUT_UNMAPPING;
        run(&mut world, &machine, &[UNSHARE, Exit::SystemOff]).0.unwrap();
        assert_eq!(machine.events(), [Event::Run(0), Event::Ack, Event::Run(0)]);
        assert!(world.caller.space.maps_content(&world.host, world.inode(), 2));
    }

    #[test]
    fn a_pinned_page_holds_its_unshare_up_with_the_gate_closed() {
        let machine = FakeMachine::new(64);
        let (mut world, _) = shared(&machine);
        let inode = world.inode().clone();
        gate::admit(&mut world.host, &inode, 2, Intent::Pin).unwrap();
        assert_eq!(run(&mut world, &machine, &[UNSHARE]).0, Err(Errno::EAGAIN));
        assert!(world.touch(2).is_err());
        machine.events();
        assert_eq!(world.run(), Err(Errno::EAGAIN));
        assert!(machine.events().is_empty(), "EL2 takes a run as the acknowledgement");
        gate::unpin(&inode, 2);
        run(&mut world, &machine, &[Exit::SystemOff]).0.unwrap();
        assert_eq!(machine.events(), [Event::Ack, Event::Run(0)]);
    }

    #[test]
    fn a_page_without_slot_or_with_a_closed_file_is_a_memory_fault() {
        let machine = FakeMachine::new(64);
        let mut world = World::new(&machine, 4);
        let beyond = Exit::MissingPage { ipa: World::IPA + 4 * PAGE, access: Access::Read };
        assert_eq!(run(&mut world, &machine, &[beyond]), (Err(Errno::EFAULT), 39));
        assert_eq!(world.run_word(40), World::IPA + 4 * PAGE);
        assert_eq!(world.run_word(48), PAGE);
        assert_eq!(world.run_word(32), 0);
        assert_eq!(run(&mut world, &machine, &[missing(0), Exit::SystemOff]).0, Ok(0));
        world.close_file();
        assert_eq!(run(&mut world, &machine, &[missing(1)]), (Err(Errno::EFAULT), 39));
        assert_eq!(world.run_word(40), World::IPA + PAGE);
    }

    #[test]
    fn ends_and_errors_are_kvms() {
        let machine = FakeMachine::new(64);
        let mut world = World::new(&machine, 4);
        assert_eq!(run(&mut world, &machine, &[Exit::SystemOff]), (Ok(0), 24));
        assert_eq!(world.run_word(32) as u32, 1);
        assert_eq!(run(&mut world, &machine, &[Exit::SystemReset]), (Ok(0), 24));
        assert_eq!(world.run_word(32) as u32, 2);
        assert_eq!(run(&mut world, &machine, &[Exit::Fatal(Fatal::AArch32)]), (Ok(0), 17));
        // EL2 refuses to run a vCPU that is off.
        assert_eq!(run(&mut world, &machine, &[]).0, Err(Errno::EAGAIN));
        assert_eq!(run(&mut world, &machine, &[Exit::CpuOff]).0, Err(Errno::EAGAIN));
    }

    #[test]
    fn with_another_vcpu_on_a_tick_returns_to_the_program() {
        let machine = FakeMachine::new(64);
        let mut world = World::new(&machine, 4);
        let exits = [Exit::Interrupted, Exit::Wait { event: false }, Exit::CpuOn { vcpu: 1 }];
        assert_eq!(run(&mut world, &machine, &exits), (Err(Errno::EINTR), 10));
        assert_eq!(run(&mut world, &machine, &[Exit::Interrupted]), (Err(Errno::EINTR), 10));
    }

    #[test]
    fn a_forwarded_call_is_answered_with_not_supported() {
        let machine = FakeMachine::new(64);
        let mut world = World::new(&machine, 4);
        let call = Exit::GuestCall { arguments: [0x8600_0001, 0, 0, 0, 0, 0, 0] };
        run(&mut world, &machine, &[call, Exit::SystemOff]).0.unwrap();
        assert_eq!(machine.events().last(), Some(&Event::Run(u64::MAX)));
    }

    #[test]
    fn a_vcpu_must_be_initialised() {
        let machine = FakeMachine::new(64);
        let mut world = World::new(&machine, 4);
        world.vcpu.with(|vcpu| vcpu.initialised.set(false)).unwrap();
        assert_eq!(world.run(), Err(Errno::ENOEXEC));
    }

    #[test]
    fn memory_of_an_unprotected_vm_is_lent_and_stays_mapped() {
        let machine = FakeMachine::new(64);
        let before = machine.frames().free();
        let mut world = World::of_type(&machine, 4, 0);
        let frame = world.touch(0).unwrap();
        machine.events();
        run(&mut world, &machine, &[missing(0), Exit::SystemOff]).0.unwrap();
        let gfn = World::IPA / PAGE;
        let boot = Event::Boot { pc: 0, x0: 0 };
        assert_eq!(
            machine.events(),
            [boot, Event::Run(0), Event::Share { pfn: frame.0, gfn }, Event::Run(0)]
        );
        assert_eq!(world.touch(0), Ok(frame));
        let host = world.close_everything();
        assert_eq!(machine.events().last(), Some(&Event::Unshare { gfn }));
        assert_eq!(host.frames.free(), before);
    }
}
