//! The host's library on the hypervisor's core, on the simulated machine: a guest_memfd of a protected VM from
//! its first page to the end of its VM, with no fake between the two.

use abi::host::{CALL_WORDS, RESULT_WORDS};
use abi::{HostCall, HostState, guest, psci, smccc};
use host_stub::errno::Errno;
use host_stub::gmem::fallocate::MapsContent;
use host_stub::gmem::gate::{self, Intent, Refusal};
use host_stub::gmem::{Inode, View};
use host_stub::host::Host;
use host_stub::kernel::release_vm;
use host_stub::kvm::memory::Caller;
use host_stub::kvm::run::{self, Step};
use host_stub::kvm::slots::{Descriptor, GUEST_MEMFD, RegionRequest, set_region};
use host_stub::kvm::vm::TYPE_PROTECTED;
use host_stub::kvm::{VcpuRef, Vm};
use host_stub::machine::{Abort, Hidden, Hypervisor, Machine, Memory, OddCall, Timed, Undefined};
use host_stub::mm::space::Access;
use host_stub::mm::{Frames, Holder, PAGE, Pfn};
use host_stub::process::context::{FpState, UserContext};
use host_stub::secondary::Secondary;
use hyp::testing::{RAM_PAGES, RAM_START, World};
use hyp::vm::context::{Context, Trap};
use std::ops::Range;
use std::rc::Rc;

/// Where the guest's memory begins.
const RAM: u64 = 0x8000_0000;
/// First page of the frames that the host has to give, and how many.
const FRAMES: Range<u64> = 0x1000..RAM_PAGES;

/// The simulated machine as the host sees it: through its stage-2, on CPU 1.
#[derive(Debug)]
struct Hardware {
    world: World,
}

impl Hardware {
    fn translate(&self, address: u64) -> Result<u64, Abort> {
        let sim = self.world.sim();
        sim.access_stage2(1, self.world.host(), address, sim::Access::Write)
            .map_err(|_| Abort { esr: 0x96 << 24 | Abort::S1PTW | 0x10, far: address })
    }
}

impl Hypervisor for Hardware {
    fn call_words(&self, words: &[u64; CALL_WORDS]) -> [u64; RESULT_WORDS] {
        let mut result = [0; RESULT_WORDS];
        match self.world.hyp.host_call(0, words).result() {
            None => result[0] = smccc::NOT_SUPPORTED,
            Some(done) => result[1..].copy_from_slice(&done.to_words()),
        }
        self.world.check();
        result
    }
}

impl Memory for Hardware {
    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), Abort> {
        into.copy_from_slice(&self.world.sim().read_bytes(self.translate(address)?, into.len()));
        Ok(())
    }
    fn write(&self, address: u64, from: &[u8]) -> Result<(), Abort> {
        self.world.sim().write_bytes(self.translate(address)?, from);
        Ok(())
    }
    fn load(&self, address: u64) -> Result<u64, Abort> {
        Ok(self.world.sim().load64(self.translate(address)?))
    }
    fn store(&self, address: u64, value: u64) -> Result<(), Abort> {
        self.world.sim().store64(self.translate(address)?, value);
        Ok(())
    }
    fn zero(&self, page: Pfn) -> Result<(), Abort> {
        self.write(page.address(), &[0; PAGE as usize])
    }
    fn make_executable(&self, _page: Pfn) {}
    fn publish_tables(&self) {}
    fn flush_page(&self, _asid: u16, _address: u64) {}
    fn flush_space(&self, _asid: u16) {}
}

impl Machine for Hardware {
    fn now(&self) -> u64 {
        0
    }
    fn take_interrupts(&self) {}
    fn idle(&self) {}
    fn console(&self, _bytes: &[u8]) {}
    fn smc(&self, _words: [u64; 4]) -> [u64; 4] {
        [smccc::NOT_SUPPORTED, 0, 0, 0]
    }
    fn odd_call(&self, _which: OddCall, _words: &[u64; CALL_WORDS]) -> u64 {
        smccc::NOT_SUPPORTED
    }
    fn hidden(&self, _which: Hidden) -> Result<u64, Undefined> {
        unreachable!("no register is read here");
    }
    /// The simulated machine has one CPU.
    fn secondaries(&self) -> &[Secondary] {
        &[]
    }

    fn turn_on(&self, _: usize) -> u64 {
        abi::psci::INVALID_PARAMETERS
    }

    fn is_off(&self, _: usize) -> bool {
        true
    }

    fn wake(&self) {}
    fn kick(&self, _cpu: usize) {}

    fn relax(&self) {}

    fn timed(&self, _what: Timed, _words: &[u64; CALL_WORDS]) -> (u64, [u64; RESULT_WORDS]) {
        unreachable!("nothing is timed here");
    }
    fn counter_at_entry(&self) -> u64 {
        0
    }
    fn run_user(&self, _context: &mut UserContext, _root: Pfn, _asid: u16) {}
    fn save_fp(&self, _state: &mut FpState) {}
    fn restore_fp(&self, _state: &FpState) {}
    fn random(&self) -> [u8; 16] {
        [0; 16]
    }
}

/// The programs of the host: notes what was unmapped, and what the hypervisor said of it at that moment.
#[derive(Debug, Default)]
struct Programs {
    unmapped: Vec<(u64, Option<HostState>)>,
}

impl MapsContent for Programs {
    fn unmap_content(&mut self, host: &mut Host, inode: &Rc<Inode>, pages: &Range<u64>) {
        for index in pages.clone() {
            let state = inode
                .page(index)
                .and_then(|page| host.machine.call(HostCall::QueryPage { pfn: page.frame.0 })?.host_state());
            self.unmapped.push((index, state));
        }
    }
}

impl Caller for Programs {
    fn frame_at(&mut self, _host: &mut Host, _address: u64, _access: Access) -> Result<Pfn, Errno> {
        Err(Errno::EFAULT)
    }

    fn is_single_threaded(&self) -> bool {
        true
    }
}

/// A host with one protected VM whose memory is a guest_memfd of four pages, mapped and initially shared.
struct Stage<'m> {
    hardware: &'m Hardware,
    host: Host<'m>,
    programs: Programs,
    inode: Rc<Inode>,
    view: Rc<View>,
    vm: Rc<Vm>,
    vcpu: VcpuRef,
}

fn hardware() -> &'static Hardware {
    Box::leak(Box::new(Hardware { world: World::new() }))
}

impl<'m> Stage<'m> {
    fn new(hardware: &'m Hardware) -> Self {
        let records = vec![Holder::Reserved; RAM_PAGES as usize].leak();
        let mut frames = Frames::new(Pfn(RAM_START), records);
        frames.release(Pfn(RAM_START + FRAMES.start), Pfn(RAM_START + FRAMES.end));
        let mut host = Host::new(hardware, frames);
        let vm = Rc::new(Vm::new(&mut host, TYPE_PROTECTED).unwrap());
        let inode = Rc::new(Inode::new(&mut host, 4 * PAGE, 3).unwrap());
        let view = Rc::new(View::new(inode.clone(), vm.clone()));
        let request = RegionRequest {
            flags: GUEST_MEMFD,
            guest_phys_addr: RAM,
            memory_size: 4 * PAGE,
            ..RegionRequest::default()
        };
        set_region(&vm, &request, true, &|_| Descriptor::Gmem(view.clone())).unwrap();
        vm.create_vcpu(&mut host, 0).unwrap();
        let vcpu = VcpuRef::new(&vm, 0).unwrap();
        vcpu.with(|vcpu| vcpu.initialised.set(true)).unwrap();
        Self { hardware, host, programs: Programs::default(), inode, view, vm, vcpu }
    }

    /// The guest's next run does this.
    fn guest(&self, step: impl FnMut(&mut Context) -> Trap + Send + 'static) {
        self.hardware.world.hyp.machine().push_step(step);
    }

    /// The guest's next run stores to one of its pages.
    fn guest_touches(&self, page: u64) {
        let ipa = RAM + page * PAGE;
        self.guest(move |_| Trap::Sync { esr: 0x24 << 26 | 1 << 25 | 1 << 6 | 7, far: ipa, hpfar: ipa >> 8 });
    }

    /// The guest's next run makes a call.
    fn guest_calls(&self, function: u32, arguments: [u64; 3]) {
        self.guest(move |context| {
            context.set_x(0, u64::from(function));
            for (register, value) in (1..).zip(arguments) {
                context.set_x(register, value);
            }
            context.pc = context.pc.wrapping_add(4);
            Trap::Sync { esr: 0x16 << 26 | 1 << 25, far: 0, hpfar: 0 }
        });
    }

    /// The guest's next run finds this in x0 and then turns itself off, which ends the host's run.
    fn guest_finds_and_ends(&self, x0: u64) {
        self.guest(move |context| {
            assert_eq!(context.x(0), x0);
            context.set_x(0, u64::from(psci::SYSTEM_OFF));
            Trap::Sync { esr: 0x16 << 26 | 1 << 25, far: 0, hpfar: 0 }
        });
    }

    fn run(&mut self) -> Result<u64, Errno> {
        let mut entry = run::begin(&mut self.host, &mut self.programs, &self.vcpu)?;
        loop {
            let result = self.host.machine.call(entry.call());
            entry = match entry.end(&mut self.host, &mut self.programs, result) {
                Step::Enter(entry) | Step::Yield(entry) | Step::Wait(entry) => entry,
                Step::Off(_) => return Err(Errno::EAGAIN),
                Step::Return(result) => return result,
            };
        }
    }

    fn admit(&mut self, page: u64) -> Result<Pfn, Refusal> {
        gate::admit(&mut self.host, &self.inode, page, Intent::Fault)
    }

    /// Ends the VM and lets the host have its pages back.
    fn end(self) -> Host<'m> {
        let Self { mut host, inode, view, vm, vcpu, .. } = self;
        drop(vcpu);
        let file = Rc::into_inner(view).unwrap();
        let (_, held) = file.into_parts();
        drop(held);
        release_vm(&mut host, vm);
        Rc::into_inner(inode).unwrap().destroy(&mut host);
        host
    }
}

#[test]
fn content_leaves_the_host_when_the_guest_first_uses_it() {
    let hardware = hardware();
    let mut stage = Stage::new(hardware);
    let frame = stage.admit(1).unwrap();
    hardware.write(frame.address(), b"the guest's image").unwrap();
    stage.guest_touches(1);
    stage.guest_calls(psci::SYSTEM_OFF, [0; 3]);
    assert_eq!(stage.run(), Ok(0));
    assert_eq!(stage.programs.unmapped, [(1, Some(HostState::Owned))], "unmapped before it was donated");
    assert_eq!(stage.admit(1), Err(Refusal::Private));
    assert!(hardware.load(frame.address()).is_err(), "the host's own access aborts");
    assert!(stage.admit(0).is_ok(), "a page that the guest has not used stays the host's");
}

#[test]
fn an_unshare_finds_the_pages_unmapped_while_they_are_still_shared() {
    let hardware = hardware();
    let mut stage = Stage::new(hardware);
    stage.guest_touches(2);
    stage.guest_calls(guest::MEM_SHARE, [RAM + 2 * PAGE, 0, 0]);
    stage.guest(|_| Trap::Irq);
    stage.guest_calls(guest::MEM_UNSHARE, [RAM + 2 * PAGE, 0, 0]);
    stage.guest_finds_and_ends(0);
    assert_eq!(stage.run(), Ok(0));
    let expected = [(2, Some(HostState::Owned)), (2, Some(HostState::SharedBorrowed))];
    assert_eq!(stage.programs.unmapped, expected);
    assert_eq!(stage.admit(2), Err(Refusal::Private));
    assert_eq!(stage.host.counters.unshares, 1);
}

#[test]
fn what_a_guest_shares_the_gate_admits_and_the_host_reads() {
    let hardware = hardware();
    let mut stage = Stage::new(hardware);
    stage.guest_calls(guest::MEM_SHARE, [RAM + 3 * PAGE, 0, 0]);
    // The page was not there: the host gave it, and the guest makes its call again.
    stage.guest_calls(guest::MEM_SHARE, [RAM + 3 * PAGE, 0, 0]);
    stage.guest_finds_and_ends(0);
    assert_eq!(stage.run(), Ok(0));
    let frame = stage.admit(3).unwrap();
    assert_eq!(hardware.load(frame.address()), Ok(0));
}

#[test]
fn the_end_of_a_vm_gives_every_page_back() {
    let hardware = hardware();
    let before = hardware.world.census();
    let mut stage = Stage::new(hardware);
    let free = stage.host.frames.census().free;
    for page in 0..4 {
        stage.guest_touches(page);
    }
    stage.guest_calls(psci::SYSTEM_OFF, [0; 3]);
    assert_eq!(stage.run(), Ok(0));
    assert!(stage.host.frames.census().free < free);
    assert_eq!(hardware.world.census().guest, 4);
    let host = stage.end();
    let census = host.frames.census();
    assert_eq!((census.vms, census.lost), (0, 0), "{census:?}");
    let after = hardware.world.census();
    assert_eq!(after.guest, 0);
    assert_eq!(after.host + census.pools, before.host, "all but what the pools keep");
}
