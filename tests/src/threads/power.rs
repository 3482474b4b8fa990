//! Two CPUs that turn a third one on at the same time, again and again, while it comes up and goes off, under a schedule
//! that shuttle decides. Afterwards the third has begun as often as one of the two was told that it would, and each time
//! where that one wanted it.

use abi::psci;
use hyp::cpus::{Cpus, Start};
use shuttle::sync::Mutex;
use shuttle::thread::{JoinHandle, spawn};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;

/// Affinities, which are the indices here. The first boots.
const AFFINITIES: [u64; 3] = [0, 1, 2];
/// The CPU that is turned on and off.
const TARGET: u64 = 1;
/// How often each of the others turns it on.
const ATTEMPTS: u64 = 2;

/// The CPUs as EL2 knows them, and the firmware, which knows which one has power.
struct Machine {
    cpus: Cpus,
    has_power: Mutex<bool>,
    /// Where it was told to begin.
    begun: Mutex<Vec<Start>>,
    /// What has come up.
    came_up: Mutex<Vec<JoinHandle<()>>>,
}

/// How a CPU ends that has turned itself off.
struct PowerIsGone;

impl Machine {
    /// What the firmware does for `CPU_ON`.
    fn give_power(self: &Arc<Self>) -> u64 {
        if core::mem::replace(&mut *self.has_power.lock().unwrap(), true) {
            return psci::ALREADY_ON;
        }
        let machine = Arc::clone(self);
        let cpu = spawn(move || machine.come_up());
        self.came_up.lock().unwrap().push(cpu);
        psci::SUCCESS
    }

    /// The third CPU: it comes up through EL2, runs the host for a moment, and turns itself off.
    fn come_up(&self) {
        let start = self.cpus.arrive(TARGET as usize);
        self.begun.lock().unwrap().push(start.expect("the CPU has come up, and nobody has asked for it"));
        let told = self.cpus.info(TARGET, || panic!("a CPU that runs is not the firmware's to tell of"));
        assert_eq!(told, psci::AFFINITY_ON);
        // Without power it does not come back from its call.
        let gone = catch_unwind(AssertUnwindSafe(|| {
            self.cpus.turn_off(TARGET as usize, || {
                *self.has_power.lock().unwrap() = false;
                resume_unwind(Box::new(PowerIsGone))
            })
        }));
        match gone {
            Err(why) if why.is::<PowerIsGone>() => {}
            Err(why) => resume_unwind(why),
            Ok(answer) => panic!("a CPU without power comes back from CPU_OFF with {answer:#x}"),
        }
    }

    /// One of the other two. Returns where it was promised that the third begins.
    fn turn_on(self: &Arc<Self>, cpu: u64) -> Vec<Start> {
        let mut promised = Vec::new();
        for attempt in 0..ATTEMPTS {
            let start = Start { entry: 0x4000_0000, context: cpu * ATTEMPTS + attempt };
            match self.cpus.turn_on(TARGET, start, |_| self.give_power()) {
                psci::SUCCESS => promised.push(start),
                psci::ALREADY_ON | psci::ON_PENDING => {}
                other => panic!("CPU_ON is answered with {other:#x}"),
            }
        }
        promised
    }
}

/// Plays it once.
///
/// # Panics
/// If the third CPU begins where nobody has asked for it, or does not where somebody has.
pub fn turn_a_cpu_on_from_two() {
    let machine = Arc::new(Machine {
        cpus: Cpus::none(),
        has_power: Mutex::new(false),
        begun: Mutex::default(),
        came_up: Mutex::default(),
    });
    assert!(machine.cpus.name(&AFFINITIES, 0));
    let other = Arc::clone(&machine);
    let other = spawn(move || other.turn_on(2));
    let mut promised = machine.turn_on(0);
    promised.extend(other.join().expect("a CPU that fails has ended the execution"));
    loop {
        let cpu = machine.came_up.lock().unwrap().pop();
        let Some(cpu) = cpu else { break };
        cpu.join().expect("a CPU that fails has ended the execution");
    }
    assert!(!promised.is_empty(), "nobody could turn it on");
    let sorted = |mut starts: Vec<Start>| {
        starts.sort_by_key(|start| start.context);
        starts
    };
    let begun = machine.begun.lock().unwrap().clone();
    assert_eq!(sorted(begun), sorted(promised), "where the CPU has begun, and where it was to");
}
