//! The real core and the specification, call by call: after each, the outcome and everything that can be seen of
//! pages and VMs must be the same. A difference is told as the shortest story that still shows one.

use abi::page::{Permissions, Pool};
use deed_tests::Dice;
use deed_tests::pair::{Pair, Told};
use spec::state::{GuestEntry, HostEntry, Phase, Sharing, VCPUS, Vm};
use spec::{Call, Run, State};

/// Sequences of a push; `DEED_SEQUENCES` asks for another number, `DEED_SEED` for another first seed.
const SEQUENCES: u64 = 300;
/// Calls of a sequence: this many at least, and up to three times as many.
const CALLS: u64 = 50;

/// Pages of the world: a 2 MiB region ends in their middle.
const P: usize = 32;
const V: usize = 4;
const G: usize = 12;

/// Where guests begin: at the end of a region, or where the guest's address space ends.
const GFNS: [u64; 2] = [0x1fa, (1 << 28) - G as u64];

/// A sequence: what it starts from, and its calls.
#[derive(Clone)]
struct Sequence {
    poor: bool,
    gfn: u64,
    calls: Vec<Call>,
}

/// Chooses calls that mostly have a chance, and sometimes none.
struct Chooser {
    dice: Dice,
    gfn: u64,
}

impl Chooser {
    fn count(&mut self) -> u64 {
        self.dice.pick(&[1, 1, 1, 1, 2, 2, 3, 5, 9, 0])
    }

    fn pfn(&mut self) -> u64 {
        self.dice.below(P as u64 + 2)
    }

    /// A run of RAM; preferably one that the host's books say this of.
    fn pfns(&mut self, state: &State<P, V, G>, wanted: fn(&HostEntry) -> bool) -> Run {
        let count = match self.dice.below(40) {
            0 => u64::MAX,
            1 => 1 << 52,
            _ => self.count(),
        };
        let mut first = self.pfn();
        for _ in 0..4 {
            if state.pages.get(first as usize).is_some_and(|page| wanted(&page.host)) {
                break;
            }
            first = self.pfn();
        }
        Run { first, count }
    }

    /// A run of guest pages; preferably one that the guest's table says this of.
    fn gfns(&mut self, vm: &Vm<G>, wanted: fn(&GuestEntry) -> bool) -> Run {
        let mut run = self.any_gfns();
        for _ in 0..4 {
            if vm.entries.get(run.first as usize).is_some_and(wanted) {
                break;
            }
            run = self.any_gfns();
        }
        run
    }

    fn any_gfns(&mut self) -> Run {
        let end_is_the_end = self.gfn != GFNS[0];
        let count = self.count();
        let first = self.dice.below(G as u64 + if end_is_the_end { 2 } else { 0 });
        // Elsewhere there are more guest pages behind the world's.
        let most = if end_is_the_end { u64::MAX } else { G as u64 - first };
        Run { first, count: count.min(most) }
    }

    /// A VM: mostly one that is there, and of the kind and phase that most calls are for.
    fn vm(&mut self, state: &State<P, V, G>) -> u8 {
        let mut vm = self.dice.below(V as u64) as u8;
        for _ in 0..4 {
            if matches!(state.vms[usize::from(vm)].phase, Phase::Live | Phase::Dying) {
                break;
            }
            vm = self.dice.below(V as u64) as u8;
        }
        vm
    }

    fn choose(&mut self, state: &State<P, V, G>) -> Call {
        let number = self.vm(state);
        let (vm, of) = (number, &state.vms[usize::from(number)]);
        let vcpu = self.dice.below(VCPUS as u64) as u8;
        let to_hyp = state.pages.iter().filter(|page| matches!(page.host, HostEntry::Hyp(_))).count();
        let host_owns = |host: &HostEntry| *host == HostEntry::Owned;
        let lent = |host: &HostEntry| *host == HostEntry::LentToHyp;
        let empty = |entry: &GuestEntry| *entry == GuestEntry::Empty;
        let device = |entry: &GuestEntry| *entry == GuestEntry::Device;
        let memory = |entry: &GuestEntry| matches!(entry, GuestEntry::Page { .. });
        let private = |entry: &GuestEntry| matches!(entry, GuestEntry::Page { sharing: Sharing::Owned, .. });
        let shared = |entry: &GuestEntry| matches!(entry, GuestEntry::Page { sharing: Sharing::Shared, .. });
        let alive = state.vms.iter().any(|vm| vm.phase == Phase::Live);
        let unborn = state.vms.iter().any(|vm| vm.phase == Phase::Unborn);
        if unborn && !alive && self.dice.below(3) == 0 {
            return self.create();
        }
        match self.dice.below(66) {
            0..=1 if unborn => self.create(),
            2..=4 => Call::ShareHyp { pfns: self.pfns(state, host_owns) },
            5..=6 => Call::UnshareHyp { pfns: self.pfns(state, lent) },
            7..=9 => Call::Pin { pfn: self.pfns(state, lent).first },
            10..=11 => Call::Unpin { pfn: self.pfns(state, lent).first },
            12 if to_hyp < P / 2 => {
                let pool = self.dice.pick(&[Pool::Tables, Pool::Metadata]);
                Call::PoolTopUp { pool, pfns: self.pfns(state, host_owns) }
            }
            13 if to_hyp < P / 2 => Call::VmTopUp { vm, pfns: self.pfns(state, host_owns) },
            14..=25 => {
                let (pfns, gfns) = (self.pfns(state, host_owns), self.gfns(of, empty));
                let count = if pfns.count > 9 { pfns.count } else { gfns.count };
                // No run leaves the guest's part of the world where there is something behind it.
                let count = if self.gfn == GFNS[0] { count.min(G as u64 - gfns.first) } else { count };
                let (pfn, gfn) = (pfns.first, gfns.first);
                if of.protected != (self.dice.below(16) == 0) {
                    Call::DonateGuest { vm, pfn, gfn, count }
                } else {
                    let permissions = Permissions { write: self.dice.below(2) == 0, execute: vcpu == 0 };
                    Call::ShareGuest { vm, pfn, gfn, count, permissions }
                }
            }
            26..=27 => Call::UnshareGuest { vm, gfns: self.gfns(of, memory) },
            28..=31 => Call::ReclaimGuest { vm, gfns: self.gfns(of, memory) },
            32 => Call::QueryPage { pfn: self.pfn() },
            33..=36 => {
                let waits = of.pending.iter().position(Option::is_some);
                Call::UnshareAck { vm, vcpu: waits.map_or(vcpu, |waits| waits as u8) }
            }
            37 if self.dice.below(2) == 0 => Call::VmTeardownStart { vm },
            38..=40 => Call::VmTeardownFinish { vm },
            41..=46 => Call::Share { vm, gfns: self.gfns(of, private) },
            47..=51 => {
                // A request that asks the host first is cut to its first chunk before its end is looked at, so one
                // that leaves the guest's address space is not refused as the documents say. Not tried.
                let run = self.gfns(of, shared);
                let rest = (G as u64).saturating_sub(run.first).max(1);
                Call::Unshare { vm, vcpu, gfns: Run { count: run.count.min(rest), ..run } }
            }
            52..=54 => Call::Relinquish { vm, gfns: self.gfns(of, private) },
            55..=56 => Call::GuardMap { vm, gfns: self.gfns(of, empty) },
            57 => Call::GuardUnmap { vm, gfns: self.gfns(of, device) },
            58..=61 => Call::GuestStore { vm, gfn: self.dice.below(G as u64) },
            _ => Call::HostStore { pfn: self.pfn() },
        }
    }

    fn create(&mut self) -> Call {
        let (kind, root) = (self.dice.below(4), self.dice.below(P as u64 / 2 + 1) * 2);
        let root = root + u64::from(self.dice.below(8) == 0);
        Call::VmCreate { protected: kind < 3, immediate: kind == 0, root }
    }
}

/// Chooses and plays a sequence.
fn play_new(seed: u64) -> (Sequence, Told) {
    let mut dice = Dice::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let (poor, gfn) = (dice.below(2) == 0, dice.pick(&GFNS));
    let calls = CALLS + dice.below(2 * CALLS);
    let mut chooser = Chooser { dice, gfn };
    let mut sequence = Sequence { poor, gfn, calls: Vec::new() };
    let mut play = Pair::<P, V, G>::new(poor, gfn);
    for number in 0..calls {
        let call = chooser.choose(play.state());
        sequence.calls.push(call);
        if number % 16 == 0 {
            play.load_all();
        }
        if !play.goes_on(call) {
            break;
        }
    }
    play.end();
    (sequence, play.told)
}

fn replay(sequence: &Sequence) -> Told {
    let mut play = Pair::<P, V, G>::new(sequence.poor, sequence.gfn);
    let _ = sequence.calls.iter().all(|call| play.goes_on(*call));
    play.end();
    play.told
}

/// Drops calls as long as there is still a difference.
fn shrink(mut sequence: Sequence) -> Told {
    let mut told = replay(&sequence);
    let mut shorter = true;
    while shorter {
        shorter = false;
        for at in (0..sequence.calls.len()).rev() {
            let mut without = sequence.clone();
            without.calls.remove(at);
            let still = replay(&without);
            if still.difference.is_some() {
                (sequence, told, shorter) = (without, still, true);
            }
        }
    }
    told
}

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().and_then(|number| number.parse().ok()).unwrap_or(otherwise)
}

#[test]
fn the_core_does_what_the_specification_says() {
    let (sequences, first) = (number("DEED_SEQUENCES", SEQUENCES), number("DEED_SEED", 1));
    let mut total = Told::default();
    let mut calls = 0;
    for seed in first..first + sequences {
        let (sequence, told) = play_new(seed);
        if told.difference.is_some() {
            let told = shrink(sequence);
            panic!(
                "seed {seed}: the core and the specification differ after\n    {}\n{}",
                told.story.join("\n    "),
                told.difference.unwrap_or_default()
            );
        }
        calls += sequence.calls.len();
        total.lacks += told.lacks;
        told.pairs.into_iter().for_each(|(pair, count)| *total.pairs.entry(pair).or_default() += count);
    }
    for ((call, outcome), count) in &total.pairs {
        println!("{call}: {outcome}: {count}");
    }
    println!(
        "{sequences} sequences, {calls} calls, {} of them lacked pages; {} pairs of a call and an outcome",
        total.lacks,
        total.pairs.len()
    );
}
