//! Guests for the unit tests of this module: what a guest does at its next run, and what it must find then.

use super::trap::class;
use crate::testing::{RAM_START, World};
use crate::vm::context::{Context, Trap, pstate};
use abi::exit::Exit;
use abi::host::HostCall;
use abi::smccc::SUCCESS;
use abi::{Error, HostState, VmFlags, VmHandle, guest};

pub(super) const RAM: u64 = 0x8000_0000;
pub(super) const DEVICE: u64 = 0x0900_0000;
pub(super) const ENTRY: u64 = RAM + 0x40;

pub(super) const ASK_FIRST: VmFlags =
    VmFlags { protected: true, unshare_immediate: false, mmio_unguarded: false };
pub(super) const IL: u64 = 1 << 25;
pub(super) const ISV: u64 = 1 << 24;
pub(super) const TRANSLATION_3: u64 = 0b00_0111;

/// A VM with two vCPUs, the first of which was chosen to boot.
pub(super) fn booted(flags: VmFlags) -> (World, VmHandle) {
    let world = World::new();
    let vm = world.vm(flags, 0x1000, 16);
    for vcpu in 0..2 {
        world.ok(HostCall::VcpuCreate { vm, vcpu });
    }
    world.ok(HostCall::VcpuSetBoot { vm, vcpu: 0, pc: ENTRY, x0: 7 });
    (world, vm)
}

/// The guest's next run does this.
pub(super) fn guest(world: &World, step: impl FnMut(&mut Context) -> Trap + Send + 'static) {
    world.hyp.machine().push_step(step);
}

pub(super) fn sync(class: u64, iss: u64) -> Trap {
    Trap::Sync { esr: class << 26 | IL | iss, far: 0, hpfar: 0 }
}

/// The guest's next run makes a call from its entry.
pub(super) fn calls(world: &World, function: u32, arguments: [u64; 3]) {
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
pub(super) fn finds(world: &World, results: [u64; 4]) {
    guest(world, move |context| {
        assert_eq!((context.x[..4].to_vec(), context.pc), (results.to_vec(), ENTRY + 4));
        Trap::Irq
    });
}

pub(super) fn abort(class: u64, iss: u64, address: u64) -> Trap {
    Trap::Sync { esr: class << 26 | IL | iss, far: address, hpfar: address >> 12 << 4 }
}

/// The guest's next run touches an address, with this syndrome.
pub(super) fn touches(world: &World, iss: u64, address: u64) {
    guest(world, move |context| {
        context.pc = ENTRY;
        context.set_x(5, 0x1122_3344_5566_7788);
        abort(class::DATA_ABORT, iss, address)
    });
}

/// The guest's next run finds itself in its handler for an exception of this class and status.
pub(super) fn handles(world: &World, esr: u64) {
    guest(world, move |context| {
        assert_eq!((context.el1.esr_el1, context.el1.elr_el1, context.pc), (esr, ENTRY, 0x200));
        assert_eq!(context.pstate, pstate::RESET);
        Trap::Irq
    });
}

pub(super) fn run_with(world: &World, vm: VmHandle, vcpu: u64, values: [u64; 4]) -> Result<Exit, Error> {
    let result = world.call(HostCall::VcpuRun { vm, vcpu, values });
    result.outcome.map(|()| Exit::from_words(result.values).unwrap())
}

pub(super) fn run(world: &World, vm: VmHandle) -> Exit {
    run_with(world, vm, 0, [0; 4]).unwrap()
}

pub(super) fn donate(world: &World, vm: VmHandle, page: u64, address: u64) {
    world.ok(HostCall::DonateGuest { vm, pfn: RAM_START + page, gfn: address >> 12, pages: 1 });
}

/// A VM that shares RAM page 0x100 with the host, at its first page.
pub(super) fn sharing(flags: VmFlags) -> (World, VmHandle) {
    let (world, vm) = booted(flags);
    donate(&world, vm, 0x100, RAM);
    calls(&world, guest::MEM_SHARE, [RAM, 1, 0]);
    finds(&world, [SUCCESS, 1, 0, 0]);
    assert_eq!(run(&world, vm), Exit::Interrupted);
    assert_eq!(world.host_state(0x100), Some(HostState::SharedBorrowed));
    (world, vm)
}
