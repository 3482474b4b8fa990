//! The core on the simulated machine, seen from the machine's side: what the hardware would do with the
//! tables that the core writes. Run with `cargo test -p hyp --features sim`.
#![cfg(feature = "sim")]

use abi::host::HostCall;
use abi::page::{Pool, VmFlags, VmHandle};
use hyp::addr::{Gfn, PAGE_SIZE, Pages, PhysAddr, Vpn};
use hyp::machine::{Machine, Stage2Id, Tree};
use hyp::sync::{Lock, Mutex};
use hyp::testing::{HYP_PAGES, HYP_START, RAM_PAGES, RAM_START, TestMachine, World};
use sim::{Access, El2Stage1, Event, FaultKind, TableKind};

const RAM: u64 = RAM_START * PAGE_SIZE;
/// A run of pages of the host, far from the hypervisor's, and where a guest sees it.
const DATA: u64 = RAM_START + 0x2a00;
const GUEST_FRAME: u64 = 0x8_0000;
const CPUS: usize = 2;

/// Physical pages of the hypervisor's image.
fn image() -> impl Iterator<Item = u64> {
    HYP_START..HYP_START + HYP_PAGES
}

/// Makes a protected VM with table pages enough.
fn protected_vm(world: &World) -> VmHandle {
    world.ok(HostCall::PoolTopUp { pool: Pool::Tables, pfn: RAM_START + 0x3000, pages: 16 });
    let flags = VmFlags { protected: true, ..VmFlags::default() };
    let word = world.ok(HostCall::VmCreate { flags, root: RAM_START + 0x3100 });
    let vm = VmHandle::from_word(word).unwrap();
    world.ok(HostCall::VmTopUp { vm, pfn: RAM_START + 0x3200, pages: 16 });
    world.check();
    vm
}

#[test]
fn each_operation_of_the_machine_reaches_the_simulated_one() {
    let machine = TestMachine::new();
    let root = machine.ram(0, 2);
    let (pfn, id) = (root.start(), Stage2Id { vmid: 5, root: root.start() });
    machine.wipe(pfn);
    machine.wipe(root.get(1).unwrap());
    machine.adopt(Tree::Stage2(id), 40);
    machine.sim().clear();
    // Whoever writes to a table in use holds its owner's lock: VMID 5 is the VM in slot 4.
    let lock = Mutex::new(Lock::Vm(4), ());
    let _held = lock.lock();

    machine.write_descriptor(PhysAddr::new(RAM + 8).unwrap(), 0x70);
    machine.publish();
    machine.invalidate_stage2(id, Pages::<Gfn>::from_raw(0x200, 3).unwrap());
    machine.invalidate_hyp(Pages::<Vpn>::from_raw(7, 1).unwrap());
    machine.clean(pfn);
    machine.wipe(machine.ram(9, 1).start());
    machine.invalidate_icache();
    machine.retire_stage2(id);
    // Before EL2's tables are in use, and must map it.
    assert_eq!(machine.read_descriptor(PhysAddr::new(RAM + 8).unwrap()), 0x70);
    machine.adopt(Tree::Hyp(machine.ram(9, 1).start()), 48);
    assert_eq!(
        machine.sim().events(),
        [
            Event::WriteDesc { pa: RAM + 8, old: 0, new: 0x70 },
            Event::DsbIshst,
            Event::TlbiStage2Ipa { cpu: 0, vmid: 5, ipa: 0x20_0000, bytes: 0x3000 },
            Event::TlbiHypVa { cpu: 0, va: 0x7000, bytes: 0x1000 },
            Event::CleanPage { pa: RAM },
            Event::WipePage { pa: RAM + 0x9000 },
            Event::InvalidateIcache,
            Event::RetireRoot { pa: RAM },
            Event::TlbiStage2Vmid { cpu: 0, vmid: 5 },
            Event::TableRoot { pa: RAM + 0x9000, kind: TableKind::El2 { va_bits: 48 } },
        ]
    );
    assert_eq!(machine.sim().violations(), []);
}

#[test]
fn host_has_the_identity_of_all_ram_but_the_image_after_boot() {
    let world = World::new();
    let sim = world.sim();
    let no_map = [RAM_START + 0x800, RAM_START + 0x801];
    for page in RAM_START..RAM_START + RAM_PAGES {
        let ipa = page * PAGE_SIZE;
        let walk = sim.walk_stage2(world.host(), ipa);
        if image().any(|own| own == page) {
            assert_eq!(walk.map_err(|fault| fault.kind), Err(FaultKind::Translation), "{ipa:#x}");
            continue;
        }
        let leaf = walk.unwrap();
        assert_eq!(leaf.pa + (ipa - leaf.ipa), ipa);
        assert!(leaf.read && leaf.write);
        assert_eq!(leaf.execute, !no_map.contains(&page), "{ipa:#x}");
    }
    for leaf in sim.leaves_stage2(world.host()) {
        assert_eq!(leaf.pa, leaf.ipa);
        assert!(!leaf.execute || sim.is_ram(leaf.pa), "what is no RAM is not executed: {leaf:x?}");
    }
    assert!(sim.unordered_writes().is_empty());
    world.check();
}

#[test]
fn el2_maps_its_image_and_no_memory_of_the_host_after_boot() {
    let world = World::new();
    let sim = world.sim();
    let el2 = El2Stage1 { root: world.hyp.hyp_root().base().as_u64(), va_bits: 48 };
    let mut mapped = Vec::new();
    for leaf in sim.leaves_el2(el2) {
        assert!(!(leaf.write && leaf.execute), "{leaf:x?}");
        for pa in (leaf.pa..leaf.pa + leaf.size).step_by(PAGE_SIZE as usize).filter(|&pa| sim.is_ram(pa)) {
            mapped.push(pa / PAGE_SIZE);
        }
    }
    mapped.sort_unstable();
    assert_eq!(mapped, image().collect::<Vec<_>>());
}

#[test]
fn every_table_that_a_walk_reaches_is_the_hypervisors() {
    let world = World::new();
    let vm = protected_vm(&world);
    world.ok(HostCall::DonateGuest { vm, pfn: DATA, gfn: GUEST_FRAME, pages: 3 });
    let sim = world.sim();
    let mut tables = 0;
    for page in RAM_START..RAM_START + RAM_PAGES {
        let pa = page * PAGE_SIZE;
        if sim.is_table(pa) {
            tables += 1;
            for stage2 in [world.host(), world.guest(vm)] {
                assert!(!sim.leaves_stage2(stage2).iter().any(|leaf| pa.wrapping_sub(leaf.pa) < leaf.size));
            }
        }
    }
    assert!(tables > 8, "two roots of two pages, EL2's four levels, and more: {tables}");
}

#[test]
fn donated_page_is_lost_to_the_host_on_every_cpu_and_comes_back_wiped() {
    let world = World::new();
    let sim = world.sim();
    let vm = protected_vm(&world);
    let (host_ipa, guest_ipa) = (DATA * PAGE_SIZE, GUEST_FRAME * PAGE_SIZE);
    let secret = 0x5ec2_e75e_c2e7;
    sim.guest_or_host_write(1, world.host(), host_ipa, 0x1234).unwrap();
    world.load_all();

    world.ok(HostCall::DonateGuest { vm, pfn: DATA, gfn: GUEST_FRAME, pages: 1 });
    world.check();
    for cpu in 0..CPUS {
        for access in [Access::Read, Access::Write, Access::Execute] {
            assert!(sim.access_stage2(cpu, world.host(), host_ipa, access).is_err());
        }
        assert!(sim.access_stage2(cpu, world.host(), host_ipa + PAGE_SIZE, Access::Write).is_ok());
        assert_eq!(sim.access_stage2(cpu, world.guest(vm), guest_ipa, Access::Write), Ok(host_ipa));
    }
    assert_eq!(sim.load64_uncached(host_ipa), 0x1234, "a guest with its MMU off sees what it was given");
    assert!(sim.icache_invalidations() > 0);

    sim.guest_or_host_write(0, world.guest(vm), guest_ipa, secret).unwrap();
    let (guest, wipes) = (world.guest(vm), sim.wipes(host_ipa));
    world.ok(HostCall::VmTeardownStart { vm });
    world.check();
    world.ok(HostCall::ReclaimGuest { vm, gfn: GUEST_FRAME, pages: 1 });
    world.check();
    assert_eq!(sim.wipes(host_ipa), wipes + 1);
    for cpu in 0..CPUS {
        assert!(sim.access_stage2(cpu, guest, guest_ipa, Access::Read).is_err());
        assert_eq!(sim.guest_or_host_read(cpu, world.host(), host_ipa), Ok(0));
    }
    assert_eq!(sim.load64_uncached(host_ipa), 0, "past the caches there is nothing either");
}
