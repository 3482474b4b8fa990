//! Random calls: mostly such as have a chance in the state that they are made in, and sometimes such as have none.
//!
//! What tests play on the real core beside the rules is chosen here, so that whoever adds a call to the rules adds it to
//! all of them.

use crate::call::Call;
use crate::state::{GuestEntry, HostEntry, Phase, Run, Sharing, State, VCPUS, Vm};
use abi::page::{Permissions, Pool};

/// A small generator of numbers that look random and are the same in every run: xorshift64*.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// Starts from a seed; 0 is taken for 1.
    pub const fn new(seed: u64) -> Self {
        Self(if seed == 0 { 1 } else { seed })
    }

    /// The next number.
    pub const fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `end`.
    pub const fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 32) % end
    }

    /// One of these.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }
}

/// Chooses calls that mostly have a chance, and sometimes none.
#[derive(Clone, Debug)]
pub struct Chooser {
    /// Decides.
    pub dice: Dice,
    /// The world's guest pages end where a guest's address space ends, so runs may leave it. Elsewhere there are more
    /// guest pages behind the world's, which the specification knows nothing of.
    pub ends_with_space: bool,
}

impl Chooser {
    fn count(&mut self) -> u64 {
        self.dice.pick(&[1, 1, 1, 1, 2, 2, 3, 5, 9, 0])
    }

    fn pfn<const P: usize>(&mut self) -> u64 {
        self.dice.below(P as u64 + 2)
    }

    /// A run of RAM; preferably one that the host's books say this of.
    fn pfns<const P: usize, const V: usize, const G: usize>(
        &mut self,
        state: &State<P, V, G>,
        wanted: fn(&HostEntry) -> bool,
    ) -> Run {
        let count = match self.dice.below(40) {
            0 => u64::MAX,
            1 => 1 << 52,
            _ => self.count(),
        };
        let mut first = self.pfn::<P>();
        for _ in 0..4 {
            if state.pages.get(first as usize).is_some_and(|page| wanted(&page.host)) {
                break;
            }
            first = self.pfn::<P>();
        }
        Run { first, count }
    }

    /// A run of guest pages; preferably one that the guest's table says this of.
    fn gfns<const G: usize>(&mut self, vm: &Vm<G>, wanted: fn(&GuestEntry) -> bool) -> Run {
        let mut run = self.any_gfns::<G>();
        for _ in 0..4 {
            if vm.entries.get(run.first as usize).is_some_and(wanted) {
                break;
            }
            run = self.any_gfns::<G>();
        }
        run
    }

    fn any_gfns<const G: usize>(&mut self) -> Run {
        let count = self.count();
        let first = self.dice.below(G as u64 + if self.ends_with_space { 2 } else { 0 });
        let most = if self.ends_with_space { u64::MAX } else { G as u64 - first };
        Run { first, count: count.min(most) }
    }

    /// A VM: mostly one that is there, and of the kind and phase that most calls are for.
    fn vm<const P: usize, const V: usize, const G: usize>(&mut self, state: &State<P, V, G>) -> u8 {
        let mut vm = self.dice.below(V as u64) as u8;
        for _ in 0..4 {
            if matches!(state.vms[usize::from(vm)].phase, Phase::Live | Phase::Dying) {
                break;
            }
            vm = self.dice.below(V as u64) as u8;
        }
        vm
    }

    /// A call for somebody to make in this state.
    pub fn choose<const P: usize, const V: usize, const G: usize>(&mut self, state: &State<P, V, G>) -> Call {
        let number = self.vm(state);
        let (vm, of) = (number, &state.vms[usize::from(number)]);
        let vcpu = self.dice.below(VCPUS as u64) as u8;
        let to_hyp = state.pages.iter().filter(|page| matches!(page.host, HostEntry::Hyp(_))).count();
        let host_owns = |host: &HostEntry| *host == HostEntry::Owned;
        let lent = |host: &HostEntry| *host == HostEntry::LentToHyp;
        let lendable = |host: &HostEntry| matches!(host, HostEntry::Owned | HostEntry::LentToGuests(_));
        let of_guest = |host: &HostEntry| matches!(host, HostEntry::Guest { .. });
        let empty = |entry: &GuestEntry| *entry == GuestEntry::Empty;
        let device = |entry: &GuestEntry| *entry == GuestEntry::Device;
        let memory = |entry: &GuestEntry| matches!(entry, GuestEntry::Page { .. });
        let private = |entry: &GuestEntry| matches!(entry, GuestEntry::Page { sharing: Sharing::Owned, .. });
        let shared = |entry: &GuestEntry| matches!(entry, GuestEntry::Page { sharing: Sharing::Shared, .. });
        let alive = state.vms.iter().any(|vm| vm.phase == Phase::Live);
        let unborn = state.vms.iter().any(|vm| vm.phase == Phase::Unborn);
        if unborn && !alive && self.dice.below(3) == 0 {
            return self.create::<P>();
        }
        match self.dice.below(69) {
            0..=1 if unborn => self.create::<P>(),
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
                let wanted = if of.protected { host_owns } else { lendable };
                let (pfns, gfns) = (self.pfns(state, wanted), self.gfns(of, empty));
                let count = if pfns.count > 9 { pfns.count } else { gfns.count };
                // No run leaves the guest's part of the world where there is something behind it.
                let count = if self.ends_with_space { count } else { count.min(G as u64 - gfns.first) };
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
            32 => Call::QueryPage { pfn: self.pfn::<P>() },
            33..=36 => {
                let waits = of.pending.iter().position(Option::is_some);
                Call::UnshareAck { vm, vcpu: waits.map_or(vcpu, |waits| waits as u8) }
            }
            37 if self.dice.below(2) == 0 => Call::VmTeardownStart { vm },
            38..=40 => Call::VmTeardownFinish { vm },
            41..=46 => Call::Share { vm, gfns: self.gfns(of, private) },
            47..=51 => Call::Unshare { vm, vcpu, gfns: self.gfns(of, shared) },
            52..=54 => Call::Relinquish { vm, gfns: self.gfns(of, private) },
            55..=56 => Call::GuardMap { vm, gfns: self.gfns(of, empty) },
            57 => Call::GuardUnmap { vm, gfns: self.gfns(of, device) },
            58..=61 => Call::GuestStore { vm, gfn: self.dice.below(G as u64) },
            62..=64 => Call::ForceReclaim { pfns: self.pfns(state, of_guest) },
            _ => Call::HostStore { pfn: self.pfn::<P>() },
        }
    }

    fn create<const P: usize>(&mut self) -> Call {
        let (kind, root) = (self.dice.below(4), self.dice.below(P as u64 / 2 + 1) * 2);
        let root = root + u64::from(self.dice.below(8) == 0);
        Call::VmCreate { protected: kind < 3, immediate: kind == 0, root }
    }
}
