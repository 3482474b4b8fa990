//! The core in a starting state, and how a CPU does something there and notes it.

use super::{Core, Event, G, GFN, Got, Op, STORY, Small, Start, WINDOW, now};
use abi::exit::Exit;
use abi::host::HostCall;
use abi::{Error, VmHandle, guest, smccc};
use hyp::addr::Gfn;
use hyp::ownership::query::{AbortAnswer, GuestPage};
use hyp::testing::{Step, World, plain_setup, this_cpu};
use hyp::vm::context::{Context, Trap};
use spec::{Call, Outcome, Run, step};
use std::sync::{Arc, Mutex};

/// Two that make calls, and one that touches pages.
const CPUS: usize = 3;
/// Table pages of the host's pool at boot.
const POOL: u64 = 0x40;
/// Table pages that each VM is given before it starts.
const TABLES: u64 = 8;
/// Word that a host writes, and word that a guest writes.
const WRITTEN: u64 = 0x6465_6564;
/// How often an access is tried again before it is taken for a loop.
const TRIES: usize = 16;
/// ESR_EL2 of an HVC with immediate 0, and of a store of 8 bytes from x0 that found no translation at level 3.
const HVC: u64 = 0x16 << 26 | 1 << 25;
const STORE: u64 = 0x24 << 26 | 1 << 25 | 1 << 24 | 0b11 << 22 | 1 << 15 | 1 << 6 | 0b00_0111;

/// The core in a starting state.
pub(super) struct Stage {
    pub(super) real: Core,
    pub(super) state: Small,
    /// Translations of the VMs that are there.
    guests: Vec<sim::Stage2>,
}

impl Stage {
    pub(super) fn new(start: &Start) -> Self {
        let real = Core::on(World::of(&plain_setup(POOL), CPUS), GFN);
        let mut state = Small::new();
        let mut guests = Vec::new();
        for call in start.calls {
            let outcome = real.play(*call);
            let (expected, next) = step(&WINDOW, &state, *call, None);
            assert_eq!(outcome, expected, "{call}");
            state = next;
            if let Outcome::Created(vm) = outcome {
                real.supply(abi::page::Pool::Vm, Some(vm), TABLES);
                guests.push(real.core().guest(real.handle(vm)));
            }
        }
        Self { real, state, guests }
    }

    pub(super) fn core(&self) -> &World {
        self.real.core()
    }

    /// Lets the TLBs of all CPUs hold what they may of the pages at stake.
    pub(super) fn fill_tlbs(&self) {
        for cpu in 0..self.core().sim().cpus() {
            for page in 0..G as u64 {
                let at = (WINDOW.pfn + page) << 12;
                let _ = self.core().sim().guest_or_host_read(cpu, self.core().host(), at);
                for guest in &self.guests {
                    let at = (WINDOW.gfn + page) << 12;
                    let _ = self.core().sim().guest_or_host_read(cpu, *guest, at);
                }
            }
        }
    }

    /// Does something on this CPU and notes it.
    pub(super) fn perform(self: &Arc<Self>, op: Op, vcpu: u8) {
        let (cpu, began) = (this_cpu(), now());
        let number = STORY.with_borrow_mut(|story| {
            story.push(Event { cpu, op, vcpu, began, ended: None });
            story.len() - 1
        });
        let got = match op {
            Op::Load { pfn } => match self.host_access(pfn, false) {
                Some(value) => Got::Value(value),
                None => Got::Outcome(Outcome::Aborted),
            },
            Op::Enter { vm, vcpu } => Got::Outcome(self.enter(vm, vcpu)),
            Op::Call(call) => Got::Outcome(self.call(call, vcpu)),
        };
        let ended = Some((now(), got));
        STORY.with_borrow_mut(|story| story[number].ended = ended);
    }

    fn call(self: &Arc<Self>, call: Call, vcpu: u8) -> Outcome {
        match call {
            Call::HostStore { pfn } => match self.host_access(pfn, true) {
                Some(_) => Outcome::Done(1),
                None => Outcome::Aborted,
            },
            Call::GuestStore { vm, gfn } => self.guest_store(vm, vcpu, gfn),
            Call::Share { vm, gfns } => self.guest_call(vm, vcpu, guest::MEM_SHARE, gfns),
            Call::Unshare { vm, vcpu, gfns } => self.guest_call(vm, vcpu, guest::MEM_UNSHARE, gfns),
            Call::Relinquish { vm, gfns } => self.guest_call(vm, vcpu, guest::MEM_RELINQUISH, gfns),
            Call::GuardMap { vm, gfns } => self.guest_call(vm, vcpu, guest::MMIO_GUARD_MAP, gfns),
            Call::GuardUnmap { vm, gfns } => self.guest_call(vm, vcpu, guest::MMIO_GUARD_UNMAP, gfns),
            host => self.real.play(host),
        }
    }

    /// An access of the host to a word of a page, as its EL1 makes it: what aborts goes to EL2, which decides
    /// whether it is tried again. The value that a load finds.
    fn host_access(&self, pfn: u64, write: bool) -> Option<u64> {
        let page = WINDOW.pfn + pfn;
        let gfn = Gfn::new(page).expect("a page");
        let access = if write { abi::exit::Access::Write } else { abi::exit::Access::Read };
        for _ in 0..TRIES {
            let sim = self.core().hyp.machine().step();
            let done = if write {
                sim.guest_or_host_write(this_cpu(), self.core().host(), page << 12, WRITTEN).map(|()| 0)
            } else {
                sim.guest_or_host_read(this_cpu(), self.core().host(), page << 12)
            };
            match done {
                Ok(value) => return Some(value),
                Err(_) if self.core().hyp.host_abort(gfn, access) == AbortAnswer::Inject => return None,
                Err(_) => {}
            }
        }
        panic!("an access of the host is tried again and again");
    }

    /// Runs a vCPU with these steps. What it exits with, and how it was refused.
    fn run(&self, vm: u8, vcpu: u8, steps: Vec<Step>) -> Result<Exit, Error> {
        let machine = self.core().hyp.machine();
        machine.drop_steps();
        steps.into_iter().for_each(|step| machine.push_step(step));
        let vm: VmHandle = self.real.handle(vm);
        let result = self.core().call(HostCall::VcpuRun { vm, vcpu: vcpu.into(), values: [0; 4] });
        machine.drop_steps();
        result.outcome.map(|()| Exit::from_words(result.values).expect("an exit"))
    }

    /// A guest's call from a vCPU.
    fn guest_call(&self, vm: u8, vcpu: u8, function: u32, gfns: Run) -> Outcome {
        let base = WINDOW.gfn;
        let call = [u64::from(function), (base + gfns.first) << 12, gfns.count, 0];
        let answer = Answer::default();
        let steps = vec![
            Box::new(move |context: &mut Context| {
                call.into_iter().zip(0..).for_each(|(x, at)| context.set_x(at, x));
                Trap::Sync { esr: HVC, far: 0, hpfar: 0 }
            }) as Step,
            answer.look(),
        ];
        match self.run(vm, vcpu, steps) {
            Err(error) => not_entered(error),
            Ok(Exit::Unshare { pages, .. }) => Outcome::Asked(pages),
            Ok(Exit::MissingPage { ipa, .. }) => Outcome::Missing((ipa >> 12) - base),
            Ok(Exit::NeedPages { pool, .. }) => Outcome::Lacking(pool),
            Ok(_) => answer.outcome(),
        }
    }

    /// A guest's store to a word of a page.
    fn guest_store(self: &Arc<Self>, vm: u8, vcpu: u8, gfn: u64) -> Outcome {
        let ipa = (WINDOW.gfn + gfn) << 12;
        let stored = Arc::new(Mutex::new(false));
        let stage2 = self.guests[usize::from(vm)];
        let again = |_| {
            let (stored, stage) = (Arc::clone(&stored), Arc::clone(self));
            Box::new(move |_: &mut Context| {
                let sim = stage.core().hyp.machine().step();
                match sim.guest_or_host_write(this_cpu(), stage2, ipa, WRITTEN) {
                    Ok(()) => {
                        *stored.lock().expect("nobody fails here") = true;
                        Trap::Irq
                    }
                    Err(_) => Trap::Sync { esr: STORE, far: ipa, hpfar: ipa >> 12 << 4 },
                }
            }) as Step
        };
        match self.run(vm, vcpu, (0..TRIES).map(again).collect()) {
            Err(error) => not_entered(error),
            Ok(_) if *stored.lock().expect("nobody fails here") => Outcome::Done(1),
            Ok(Exit::Mmio { .. }) => Outcome::Device(gfn),
            Ok(_) => {
                // Of poison, which stays, the host is not told: the guest takes an abort for each try.
                let page = Gfn::new(WINDOW.gfn + gfn).expect("a guest page");
                let found = self.core().hyp.guest_page(self.real.handle(vm), page);
                if found == GuestPage::Poisoned { Outcome::Aborted } else { Outcome::Missing(gfn) }
            }
        }
    }

    /// The host enters a vCPU; the guest looks at the answer of its last call.
    fn enter(&self, vm: u8, vcpu: u8) -> Outcome {
        let answer = Answer::default();
        match self.run(vm, vcpu, vec![answer.look()]) {
            Err(error) => not_entered(error),
            Ok(Exit::NeedPages { pool, .. }) => Outcome::Lacking(pool),
            Ok(_) => answer.outcome(),
        }
    }
}

/// The outcome for a guest whose vCPU was not entered.
fn not_entered(error: Error) -> Outcome {
    match error {
        Error::Busy => Outcome::Refused(Error::Busy),
        _ => Outcome::NotServed,
    }
}

/// What a guest finds in x0 and x1.
#[derive(Clone, Default)]
struct Answer(Arc<Mutex<[u64; 2]>>);

impl Answer {
    /// The guest looks, and an interrupt arrives.
    fn look(&self) -> Step {
        let answer = Arc::clone(&self.0);
        Box::new(move |context: &mut Context| {
            *answer.lock().expect("nobody fails here") = [context.x(0), context.x(1)];
            Trap::Irq
        })
    }

    fn outcome(&self) -> Outcome {
        match *self.0.lock().expect("nobody fails here") {
            [smccc::SUCCESS, done] => Outcome::Done(done),
            [smccc::NOT_SUPPORTED, _] => Outcome::NotServed,
            _ => Outcome::InvalidParameter,
        }
    }
}
