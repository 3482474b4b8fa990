//! All CPUs make calls about the same pages and VMs at once, so that each pair of the locks of creation, host, hypervisor,
//! VM and records, and that of the CPUs' states, is taken in every order that the calls allow. A CPU that waits for ever is
//! noticed: it does not end its series.

extern crate alloc;

use alloc::vec::Vec;

use abi::page::Permissions;
use abi::{Error, HostCall, VmFlags, VmHandle, psci};
use guest_stub::protocol::player::LOAD;
use host_programs::cpu::Cpu;
use host_programs::deed::{Answer, Deed};
use host_programs::player::Player;
use host_programs::raw_vm::RawVm;
use host_programs::series::Series;
use host_programs::steps::Steps;
use host_programs::{Failure, failure};

/// Pages that are contested.
const PAGES: u64 = 4;
/// Where they go in the guest's addresses: each CPU and page has a last-level table of its own, since a page that is
/// taken by force leaves poison behind.
const GFN: u64 = 0x9_0000;
const TABLE: u64 = 512;
/// Rounds that a CPU plays against one other: no more than a last-level table has entries. More CPUs than the build
/// machine has wait for each other's time, so they play fewer.
const ROUNDS: u64 = 500;
/// Tables that the two VMs need at most.
const TABLES: u64 = 64;
/// vCPUs that a VM has at most.
const MOST_VCPUS: u64 = 8;

/// VMs with so many vCPUs that the hypervisor has no room for the record of another: making one is refused, but under all
/// the locks that it takes.
fn without_room(deed: &Deed) -> Result<Vec<RawVm>, Failure> {
    let mut vms = Vec::new();
    loop {
        let vm = RawVm::new(deed, VmFlags::default())?;
        let handle = vm.handle();
        vms.push(vm);
        for vcpu in 0..MOST_VCPUS {
            let answer = deed.call(HostCall::VcpuCreate { vm: handle, vcpu })?;
            match answer {
                Answer::Served(result) if result.outcome == Err(Error::NoMemory) => return Ok(vms),
                Answer::Served(result) if result.outcome.is_ok() => {}
                _ => return Err(failure!("a vCPU is not made: {answer}")),
            }
        }
    }
}

/// Lets all CPUs contend.
pub(crate) fn contend(deed: &Deed, steps: &mut Steps) -> Result<(), Failure> {
    let others = Cpu::count(deed)? - 1;
    let rounds = ROUNDS / (others * others);
    steps.tell("All CPUs make calls about the same pages and VMs at once.");
    let mut open = RawVm::new(deed, VmFlags::default())?;
    open.vcpu(deed, 0)?;
    let mut player = Player::new(deed, true)?;
    // Tables for all that follows: no call lacks pages.
    open.give_tables(deed, TABLES)?;
    player.give_tables(deed, TABLES)?;
    let fillers = without_room(deed)?;
    let pages = deed.alloc(PAGES)?;
    let contest = Contest { open: open.handle(), root: open.root(), protected: player.handle(), pages };

    let mut cpus = Vec::new();
    for number in 1..=others {
        let mut cpu = Cpu::on(deed, number)?;
        let calls = contest.fill(cpu.series(), number, 0);
        cpu.play(rounds, true)?;
        cpus.push((cpu, calls));
    }
    let mut own = Series::default();
    let mut observed = Observed::default();
    for round in 0..rounds {
        let calls = contest.fill(&mut own, 0, round);
        deed.series(&mut own)?;
        observed.note(&own, &calls);
    }
    let mut ended = 0;
    for (cpu, calls) in &mut cpus {
        ended += u64::from(cpu.end(true)?.rounds == rounds);
        observed.note(cpu.series(), calls);
    }
    steps.equal("every-cpu-ends-its-series", others, ended);
    let strange = &observed.strange;
    let shown = Shown(strange.as_ref());
    steps.check("every-answer-is-one-that-the-call-may-give", "no other", shown, strange.is_none());
    let (done, refused) = (observed.done, observed.refused);
    steps.check("calls-are-served", "more than 0", done, done > 0);
    steps.check("calls-are-refused-for-what-others-have-done", "more than 0", refused, refused > 0);
    let without_room = observed.without_room;
    steps.check("no-room-is-left-for-a-vcpu", "more than 0", without_room, without_room > 0);
    let report = player.ask(deed, 0, [LOAD, Player::address(0), 0, 0])?;
    steps.equal("the-guest-is-whole", 0, report[0]);

    for (cpu, _) in cpus {
        cpu.off()?;
    }
    for pfn in pages..pages + PAGES {
        // One of them has it, or nobody but the host.
        deed.call(HostCall::UnshareHyp { pfn, pages: 1 })?;
        deed.call(HostCall::UnshareGuest { vm: open.handle(), gfn: pfn - pages, pages: 1 })?;
        deed.call(HostCall::ForceReclaim { pfn, pages: 1 })?;
    }
    let free = deed.free(pages, PAGES);
    steps.check("every-page-comes-back", true, free.is_ok(), free.is_ok());
    for vm in fillers {
        vm.end(deed)?;
    }
    open.end(deed)?;
    player.end(deed, &[])
}

/// What all CPUs are about.
struct Contest {
    open: VmHandle,
    /// The open VM's root, of which no other VM can be made.
    root: u64,
    protected: VmHandle,
    pages: u64,
}

/// Calls about each page.
const CALLS: usize = 13;
/// A call and its place in the series.
type Calls = [(usize, HostCall); CALLS * PAGES as usize];

impl Contest {
    /// A round of a CPU: calls about all pages, beginning with another page on each CPU.
    fn fill(&self, series: &mut Series, cpu: u64, round: u64) -> Calls {
        series.clear();
        let (open, protected) = (self.open, self.protected);
        let mut calls = [(0, HostCall::Version); CALLS * PAGES as usize];
        for (turn, places) in (0..PAGES).zip(calls.chunks_exact_mut(CALLS)) {
            let page = (turn + cpu) % PAGES;
            let (pfn, gfn) = (self.pages + page, page);
            let donated = GFN + (cpu * PAGES + page) * TABLE + round;
            let all: [HostCall; CALLS] = [
                HostCall::ShareHyp { pfn, pages: 1 },
                HostCall::QueryPage { pfn },
                HostCall::UnshareHyp { pfn, pages: 1 },
                HostCall::ShareGuest { vm: open, pfn, gfn, pages: 1, permissions: Permissions::ALL },
                HostCall::UnshareGuest { vm: open, gfn, pages: 1 },
                HostCall::DonateGuest { vm: protected, pfn, gfn: donated, pages: 1 },
                HostCall::ForceReclaim { pfn, pages: 1 },
                HostCall::VcpuGetReg { vm: open, vcpu: 0, register: 0 },
                HostCall::VcpuRun { vm: protected, vcpu: 1, values: [LOAD, Player::address(0), 0, 0] },
                HostCall::UnshareAck { vm: protected, vcpu: 0 },
                HostCall::VmTeardownFinish { vm: open },
                HostCall::VmCreate { flags: VmFlags::default(), root: self.root },
                HostCall::VcpuCreate { vm: open, vcpu: 1 },
            ];
            for (place, call) in places.iter_mut().zip(all) {
                let at = match call {
                    HostCall::DonateGuest { .. } => series.growing_call(call, DONATED_AT),
                    _ => series.call(call),
                };
                *place = (at, call);
            }
            series.store(pfn << 12, turn);
            series.load(pfn << 12);
            series.smc([psci::AFFINITY_INFO.into(), cpu, 0, 0]);
        }
        calls
    }
}

/// Register of DONATE_GUEST that holds the gfn.
const DONATED_AT: u64 = 3;

/// What came of all calls of CPU 0, and of those of the others' last rounds.
#[derive(Default)]
struct Observed {
    done: u64,
    refused: u64,
    /// vCPUs that were not made for want of room.
    without_room: u64,
    strange: Option<(HostCall, Answer)>,
}

impl Observed {
    fn note(&mut self, series: &Series, calls: &Calls) {
        /// What a call may come to because of what others have done.
        const ALLOWED: [Error; 4] = [Error::Permission, Error::NoEntry, Error::Busy, Error::Again];
        for (at, call) in calls {
            let answer = series.answer(*at);
            match answer {
                Answer::Served(result) => match result.outcome {
                    Ok(()) => self.done += 1,
                    // These are refused in any case.
                    Err(Error::Permission)
                        if matches!(
                            call,
                            HostCall::UnshareAck { .. }
                                | HostCall::VmTeardownFinish { .. }
                                | HostCall::VmCreate { .. }
                        ) => {}
                    Err(Error::NoMemory) if matches!(call, HostCall::VcpuCreate { .. }) => {
                        self.without_room += 1
                    }
                    Err(error) if ALLOWED.contains(&error) => self.refused += 1,
                    Err(_) => self.strange = Some((*call, answer)),
                },
                _ => self.strange = Some((*call, answer)),
            }
        }
    }
}

struct Shown<'a>(Option<&'a (HostCall, Answer)>);

impl core::fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self.0 {
            None => f.write_str("no other"),
            Some((call, answer)) => write!(f, "{call:?}: {answer}"),
        }
    }
}
