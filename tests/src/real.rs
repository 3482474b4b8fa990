//! The real core, played with the calls of `spec`: a small window of its RAM and of each guest is the world.
//!
//! What the calls lack is given behind the scenes, from RAM outside the window, so that the specification need
//! not know how tables are built.

mod compare;

use abi::exit::{Access, Exit};
use abi::host::{HostCall, HostResult};
use abi::page::Pool;
use abi::{Error, HostState, VmFlags, VmHandle, guest, psci, smccc};
use hyp::testing::{CPUS, HYP_START, RAM_START, World, plain_setup};
use hyp::vm::context::Trap;
use spec::state::VCPUS;
use spec::{Call, Outcome, Run};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// Static table pages of a core that is not poor.
const POOL: u64 = 0x40;
/// RAM from here on is given behind the scenes.
const SPARE: u64 = RAM_START + 0x1000;
/// The vCPU that makes calls of which the rules do not say which one makes them: it never waits.
const ANY_VCPU: u8 = VCPUS as u8;

/// A VM of the real core.
#[derive(Clone, Copy, Debug)]
struct RealVm {
    handle: VmHandle,
    /// Pages that it was given behind the scenes.
    hidden: u64,
    live: bool,
    waits: [bool; VCPUS],
}

/// The real core, and where the world lies in it. Several threads may play at a time, each a CPU of its own.
#[derive(Debug)]
pub struct Real<const P: usize, const V: usize, const G: usize> {
    core: World,
    place: spec::World,
    /// Never held while the core does something.
    vms: Mutex<Vec<RealVm>>,
    spare: AtomicU64,
    /// How many pages the last call lacked.
    lacks: AtomicU64,
    /// Pages of anybody at boot.
    total: u64,
    /// How often RAM had changed at the last comparison.
    seen: AtomicU64,
}

impl<const P: usize, const V: usize, const G: usize> Real<P, V, G> {
    /// A core whose world ends where RAM that may change hands ends: before the hypervisor's image. With
    /// `poor`, it has as few table pages as it can have. Guest pages begin at `gfn`.
    pub fn new(poor: bool, gfn: u64) -> Self {
        static LEAST: OnceLock<u64> = OnceLock::new();
        let pool = if poor { *LEAST.get_or_init(|| World::least_pool(plain_setup)) } else { POOL };
        let core = World::of(&plain_setup(pool), CPUS);
        core.load_all();
        Self::on(core, gfn)
    }

    /// The same on a core that is there.
    pub fn on(core: World, gfn: u64) -> Self {
        let place = Self::window(gfn);
        let [spare, lacks, seen] = [SPARE, 0, 0].map(AtomicU64::new);
        let total = core.census().total();
        Self { core, place, total, vms: Mutex::default(), spare, lacks, seen }
    }

    /// Where the world of such a core lies.
    pub const fn window(gfn: u64) -> spec::World {
        let pins = hyp::ownership::share::MAX_PINNED;
        spec::World { pfn: HYP_START - P as u64, pages: P as u64, gfn, gfns: G as u64, pins }
    }

    /// Where the world lies.
    pub fn place(&self) -> &spec::World {
        &self.place
    }

    /// Lets all TLBs hold whatever they may.
    pub fn load_all(&self) {
        self.core.load_all();
    }

    /// The core.
    pub fn core(&self) -> &World {
        &self.core
    }

    fn vms(&self) -> MutexGuard<'_, Vec<RealVm>> {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn vm(&self, vm: u8) -> Option<RealVm> {
        self.vms().get(usize::from(vm)).copied()
    }

    /// Notes something about a VM.
    fn note(&self, vm: u8, change: impl FnOnce(&mut RealVm)) {
        if let Some(vm) = self.vms().get_mut(usize::from(vm)) {
            change(vm);
        }
    }

    /// The handle of a VM, or the one that it will have if no other VM goes away before.
    pub fn handle(&self, vm: u8) -> VmHandle {
        let known = self.vm(vm).map(|vm| vm.handle);
        known.or_else(|| VmHandle::new(vm, 1)).expect("slots for all VMs")
    }

    /// Makes a call as whoever makes it.
    pub fn play(&self, call: Call) -> Outcome {
        let pfn = |first: u64| self.place.pfn.saturating_add(first);
        let gfn = |first: u64| self.place.gfn.saturating_add(first);
        let handle = |vm| self.handle(vm);
        match call {
            Call::PoolTopUp { pool, pfns } => {
                self.host(HostCall::PoolTopUp { pool, pfn: pfn(pfns.first), pages: pfns.count })
            }
            Call::VmTopUp { vm, pfns } => {
                self.host(HostCall::VmTopUp { vm: handle(vm), pfn: pfn(pfns.first), pages: pfns.count })
            }
            Call::ShareHyp { pfns } => {
                self.host(HostCall::ShareHyp { pfn: pfn(pfns.first), pages: pfns.count })
            }
            Call::UnshareHyp { pfns } => {
                self.host(HostCall::UnshareHyp { pfn: pfn(pfns.first), pages: pfns.count })
            }
            Call::ForceReclaim { pfns } => {
                self.host(HostCall::ForceReclaim { pfn: pfn(pfns.first), pages: pfns.count })
            }
            Call::DonateGuest { vm, pfn: page, gfn: at, count } => {
                let (pfn, gfn) = (pfn(page), gfn(at));
                self.host(HostCall::DonateGuest { vm: handle(vm), pfn, gfn, pages: count })
            }
            Call::ShareGuest { vm, pfn: page, gfn: at, count, permissions } => {
                let (vm, pfn, gfn) = (handle(vm), pfn(page), gfn(at));
                self.host(HostCall::ShareGuest { vm, pfn, gfn, pages: count, permissions })
            }
            Call::UnshareGuest { vm, gfns } => {
                self.host(HostCall::UnshareGuest { vm: handle(vm), gfn: gfn(gfns.first), pages: gfns.count })
            }
            Call::ReclaimGuest { vm, gfns } => {
                self.host(HostCall::ReclaimGuest { vm: handle(vm), gfn: gfn(gfns.first), pages: gfns.count })
            }
            Call::QueryPage { pfn: page } => {
                let result = self.core.call(HostCall::QueryPage { pfn: pfn(page) });
                match (result.outcome, HostState::from_word(result.values[0])) {
                    (Ok(()), Some(state)) => Outcome::Page(state, result.values[1] == 1),
                    _ => self.outcome(result),
                }
            }
            Call::VmCreate { protected, immediate, root } => self.create(protected, immediate, pfn(root)),
            Call::UnshareAck { vm, vcpu } => {
                let outcome = self.host(HostCall::UnshareAck { vm: handle(vm), vcpu: vcpu.into() });
                if let Outcome::Done(_) = outcome {
                    self.note(vm, |vm| vm.waits[usize::from(vcpu)] = false);
                }
                outcome
            }
            Call::VmTeardownStart { vm } => {
                let outcome = self.host(HostCall::VmTeardownStart { vm: handle(vm) });
                if let Outcome::Done(_) = outcome {
                    self.note(vm, |vm| vm.live = false);
                }
                outcome
            }
            Call::VmTeardownFinish { vm } => self.finish(vm),
            Call::Pin { pfn: page } => one(self.host(HostCall::TestPin { pfn: pfn(page) })),
            Call::Unpin { pfn: page } => one(self.host(HostCall::TestUnpin { pfn: pfn(page) })),
            Call::Share { vm, gfns } => self.guest(vm, ANY_VCPU, guest::MEM_SHARE, gfns),
            Call::Unshare { vm, vcpu, gfns } => self.guest(vm, vcpu, guest::MEM_UNSHARE, gfns),
            Call::Relinquish { vm, gfns } => self.guest(vm, ANY_VCPU, guest::MEM_RELINQUISH, gfns),
            Call::GuardMap { vm, gfns } => self.guest(vm, ANY_VCPU, guest::MMIO_GUARD_MAP, gfns),
            Call::GuardUnmap { vm, gfns } => self.guest(vm, ANY_VCPU, guest::MMIO_GUARD_UNMAP, gfns),
            Call::GuestStore { vm, gfn } => self.guest_store(vm, gfn),
            Call::HostStore { pfn: page } => {
                let page = pfn(page) - RAM_START;
                if !self.core.host_reads(page) {
                    return Outcome::Aborted;
                }
                self.core.fill(page);
                Outcome::Done(1)
            }
            Call::Map { .. } | Call::Unmap { .. } | Call::Hold { .. } | Call::Release { .. } => {
                panic!("the host's books are not the core's: {call:?}")
            }
        }
    }

    fn host(&self, call: HostCall) -> Outcome {
        let result = self.core.call(call);
        self.outcome(result)
    }

    fn outcome(&self, result: HostResult) -> Outcome {
        match result.outcome {
            Ok(()) => Outcome::Done(result.values[0]),
            Err(Error::NoMemory) => {
                self.lacks.store(result.values[0], Ordering::Relaxed);
                Outcome::Lacking(Pool::from_word(result.values[1]).expect("a pool"))
            }
            Err(error) => Outcome::Refused(error),
        }
    }

    /// Gives the pages that the last call lacked, as many as it said. `vm` is the one that the call was about.
    ///
    /// # Panics
    /// If that does not help.
    pub fn serve_lack(&self, pool: Pool, vm: Option<u8>) {
        self.supply(pool, vm, self.lacks.load(Ordering::Relaxed));
    }

    /// Gives pages to a pool behind the scenes.
    ///
    /// # Panics
    /// If they are refused.
    pub fn supply(&self, pool: Pool, vm: Option<u8>, pages: u64) {
        let pfn = self.spare.load(Ordering::Relaxed).next_multiple_of(pages);
        self.spare.store(pfn + pages, Ordering::Relaxed);
        let give = match (pool, vm) {
            (Pool::Vm, Some(vm)) => HostCall::VmTopUp { vm: self.handle(vm), pfn, pages },
            (Pool::Vm, None) => panic!("a VM's pool lacks pages in a call about no VM"),
            _ => HostCall::PoolTopUp { pool, pfn, pages },
        };
        loop {
            match self.host(give) {
                Outcome::Done(done) => {
                    assert_eq!(done, pages, "{give:?}");
                    break;
                }
                Outcome::Lacking(Pool::Tables) if pool != Pool::Tables => self.serve_lack(Pool::Tables, None),
                refused => panic!("what was asked for is refused: {give:?}: {refused:?}"),
            }
        }
        if let (Pool::Vm, Some(vm)) = (pool, vm) {
            self.note(vm, |vm| vm.hidden += pages);
        }
    }

    /// Makes a VM with the vCPUs of the rules and [`ANY_VCPU`], all on.
    fn create(&self, protected: bool, immediate: bool, root: u64) -> Outcome {
        let flags = VmFlags { protected, unshare_immediate: immediate, mmio_unguarded: false };
        let word = match self.host(HostCall::VmCreate { flags, root }) {
            Outcome::Done(word) => word,
            refused => return refused,
        };
        let handle = VmHandle::from_word(word).expect("a handle");
        for vcpu in 0..=u64::from(ANY_VCPU) {
            while let Outcome::Lacking(pool) = self.host(HostCall::VcpuCreate { vm: handle, vcpu }) {
                self.serve_lack(pool, None);
            }
        }
        self.core.ok(HostCall::VcpuSetBoot { vm: handle, vcpu: 0, pc: 0x1000, x0: 0 });
        for vcpu in 1..=u64::from(ANY_VCPU) {
            let (exit, _) = self.core.guest_call(handle, 0, [psci::CPU_ON.into(), vcpu, 0x1000, 0]);
            assert_eq!(Exit::from_words(exit.values), Some(Exit::CpuOn { vcpu }));
        }
        let mut vms = self.vms();
        assert!(vms.iter().all(|vm| vm.handle != handle), "{handle:?} names two VMs");
        vms.push(RealVm { handle, hidden: 0, live: true, waits: [false; VCPUS] });
        Outcome::Created(vms.len() as u8 - 1)
    }

    fn finish(&self, vm: u8) -> Outcome {
        let handle = self.handle(vm);
        let mut back = 0;
        loop {
            let result = self.core.call(HostCall::VmTeardownFinish { vm: handle });
            if result.outcome.is_err() {
                return self.outcome(result);
            }
            back += result.values[0];
            if result.values[1] == 0 {
                return Outcome::Ended(back - self.vm(vm).map_or(0, |vm| vm.hidden));
            }
        }
    }

    /// A guest's call about its memory, by one of its vCPUs.
    fn guest(&self, vm: u8, vcpu: u8, function: u32, gfns: Run) -> Outcome {
        let Some(of) = self.vm(vm) else { return Outcome::NotServed };
        if !of.live || of.waits.get(usize::from(vcpu)) == Some(&true) {
            return Outcome::NotServed;
        }
        // What is no address is one beyond all that there are.
        let page = self.place.gfn.saturating_add(gfns.first).min((1 << 52) - 1);
        let call = [function.into(), page << 12, gfns.count, 0];
        let (exit, answer) = self.core.guest_call(of.handle, vcpu.into(), call);
        let exit = exit.outcome.map(|()| Exit::from_words(exit.values).expect("an exit"));
        match (exit, answer) {
            (Ok(Exit::Interrupted), Some([smccc::SUCCESS, done, ..])) => Outcome::Done(done),
            (Ok(Exit::Interrupted), Some([smccc::NOT_SUPPORTED, ..])) => Outcome::NotServed,
            (Ok(Exit::Interrupted), Some([guest::INVALID_PARAMETER, 0, 0, 0])) => Outcome::InvalidParameter,
            (Ok(Exit::Unshare { ipa, pages }), None) if function == guest::MEM_UNSHARE => {
                assert_eq!(ipa, page << 12);
                self.note(vm, |vm| vm.waits[usize::from(vcpu)] = true);
                Outcome::Asked(pages)
            }
            (Ok(Exit::MissingPage { ipa, access: Access::Write }), None) => {
                Outcome::Missing((ipa >> 12).wrapping_sub(self.place.gfn))
            }
            (Ok(Exit::NeedPages { pool, pages }), None) => {
                self.lacks.store(pages, Ordering::Relaxed);
                Outcome::Lacking(pool)
            }
            other => panic!("a guest's call about its memory comes to {other:x?}"),
        }
    }

    /// A guest's store of 8 bytes from x5; what faults goes to EL2.
    fn guest_store(&self, vm: u8, gfn: u64) -> Outcome {
        const VALUE: u64 = 0x0123_4567_89ab_cdef;
        let Some(of) = self.vm(vm).filter(|vm| vm.live) else { return Outcome::NotServed };
        let ipa = (self.place.gfn + gfn) << 12;
        let fault =
            match self.core.sim().access_stage2(1, self.core.guest(of.handle), ipa, sim::Access::Write) {
                Ok(pa) => {
                    self.core.fill((pa >> 12) - RAM_START);
                    return Outcome::Done(1);
                }
                Err(fault) => fault,
            };
        let (machine, esr_el1) = (self.core.hyp.machine(), Arc::new(AtomicU64::new(0)));
        let seen = Arc::clone(&esr_el1);
        machine.push_step(move |context| {
            context.set_x(5, VALUE);
            Trap::Sync { esr: store_fault(fault), far: ipa, hpfar: ipa >> 12 << 4 }
        });
        machine.push_step(move |context| {
            seen.store(context.el1.esr_el1, Ordering::Relaxed);
            Trap::Irq
        });
        let vcpu = ANY_VCPU.into();
        let result = self.core.call(HostCall::VcpuRun { vm: of.handle, vcpu, values: [0; 4] });
        machine.drop_steps();
        let exit = result.outcome.map(|()| Exit::from_words(result.values).expect("an exit"));
        match exit {
            Ok(Exit::MissingPage { ipa: at, access: Access::Write }) if at == ipa => Outcome::Missing(gfn),
            Ok(Exit::Mmio { ipa: at, size: 8, write: true, value: VALUE }) if at == ipa => {
                Outcome::Device(gfn)
            }
            Ok(Exit::Interrupted) if is_external_abort(esr_el1.load(Ordering::Relaxed)) => Outcome::Aborted,
            other => panic!("a guest's store that faults comes to {other:x?}"),
        }
    }
}

/// ESR_EL2 of a store of 8 bytes from x5 that faults at stage 2 (Arm ARM D24.2.40).
fn store_fault(fault: sim::Fault) -> u64 {
    const DATA_ABORT: u64 = 0x24 << 26 | 1 << 25;
    const EIGHT_BYTES_FROM_X5: u64 = 1 << 24 | 0b11 << 22 | 5 << 16 | 1 << 15 | 1 << 6;
    let kind = match fault.kind {
        sim::FaultKind::Translation => 0b0001,
        sim::FaultKind::AccessFlag => 0b0010,
        sim::FaultKind::Permission => 0b0011,
        sim::FaultKind::External => panic!("a guest's walk leaves RAM"),
    };
    DATA_ABORT | EIGHT_BYTES_FROM_X5 | kind << 2 | u64::from(fault.level)
}

/// Whether a guest finds that its access was an external abort, not one of its translation.
fn is_external_abort(esr_el1: u64) -> bool {
    esr_el1 >> 26 == 0x25 && esr_el1 & 0x3f == 0b01_0000
}

/// The outcome of a call about one page that does not say so.
fn one(outcome: Outcome) -> Outcome {
    if let Outcome::Done(_) = outcome { Outcome::Done(1) } else { outcome }
}
