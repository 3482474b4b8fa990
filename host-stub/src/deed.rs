//! `/dev/deed`: the research device. It lets a program act as a hostile host kernel.
//!
//! Every argument is an array of 64-bit words that is read and written back. What a program does here can
//! break the host's own books; it cannot break what Deed promises, and that is what it is for.

use alloc::vec::Vec;

use abi::host::{CALL_WORDS, RESULT_WORDS};
use abi::{HostCall, HostState};

use crate::cpus;
use crate::errno::Errno;
use crate::fs::File;
use crate::host::{Host, Misbehaviour};
use crate::machine::{Hidden, OddCall};
use crate::mm::{Holder, PAGE, Pfn, is_aligned};
use crate::play;
use crate::process::Process;
use crate::secondary::{self, How};
use crate::series::{RECORD_BYTES, Record, Step};

/// Requests: `_IOWR('D', n, u64[words])`. The programs have their own copy
/// (`host-stub/programs/src/uapi.rs`): these are the two sides of an interface.
pub mod request {
    const fn request(number: u32, words: u32) -> u32 {
        3 << 30 | (words * 8) << 16 | 0x44 << 8 | number
    }

    /// In x0 to x6, out x0 to x9 of an `HVC #0`.
    pub const CALL: u32 = request(0, 18);
    /// In address, write?, value; out value, 0 or 1 for an abort, ESR, FAR.
    pub const TOUCH: u32 = request(1, 6);
    /// In descriptor of a guest_memfd, byte offset; out frame number.
    pub const GMEM_PFN: u32 = request(2, 3);
    /// In bits of [`crate::host::Misbehaviour`].
    pub const MISBEHAVE: u32 = request(3, 1);
    /// Out frame number, in count.
    pub const ALLOC: u32 = request(4, 2);
    /// In frame number, count.
    pub const FREE: u32 = request(5, 2);
    /// Out free, used, given to pools, given to VMs, marked aborts, unshares.
    pub const STATS: u32 = request(6, 6);
    /// In descriptor of a VM; out handle.
    pub const VM_HANDLE: u32 = request(7, 2);
    /// In and out x0 to x3 of an `SMC #0`.
    pub const SMC: u32 = request(8, 4);
    /// In 1 (`HVC #1`) or 2 (`SMC #1`), x0 to x6; out x0.
    pub const HVC_IMM: u32 = request(9, 8);
    /// In address of an array of [`crate::series::Record`]s, their number: done one after the other, each written back.
    pub const SERIES: u32 = request(10, 2);
    /// In address of a list, entries, rounds: see [`crate::play`].
    pub const PLAY: u32 = request(11, 3);
    /// Out the virtual counter at the kernel's first instruction.
    pub const COUNTER_AT_ENTRY: u32 = request(12, 1);
    /// In which of [`crate::machine::Hidden`]; out value, 0 or 1 for UNDEFINED, ESR.
    pub const HIDDEN: u32 = request(13, 4);
    /// Out the number of CPUs. CPU 0 is the one that runs programs; the requests below are about the others.
    pub const CPUS: u32 = request(14, 1);
    /// In CPU: turned on. Returns when it waits for work.
    pub const CPU_ON: u32 = request(15, 1);
    /// In CPU: turned off. Returns when it is.
    pub const CPU_OFF: u32 = request(16, 1);
    /// In CPU, address of an array of [`crate::series::Record`]s, their number, rounds (0: until it is told to end),
    /// whether an abort does not end it: the CPU begins to play them. If word 8 of a call names one of x1 to x6, word 9
    /// is added to that after each round.
    pub const CPU_PLAY: u32 = request(17, 5);
    /// In CPU; out [`crate::secondary::State`], rounds played, aborts taken.
    pub const CPU_PROGRESS: u32 = request(18, 4);
    /// In CPU, address of an array, records there, 0 or 1: let it play all its rounds; out rounds played, aborts
    /// taken. The CPU ends its round, and what came of each record last is in the array.
    pub const CPU_END: u32 = request(19, 6);
}

/// Records that one request can have.
const MAX_RECORDS: u64 = 256;

/// Serves a request. ENOTTY if there is none with this number.
pub fn ioctl(host: &mut Host, process: &mut Process, number: u32, argument: u64) -> Result<u64, Errno> {
    match number {
        request::CALL => with(host, process, argument, |host, _, words: &mut [u64; 18]| {
            let call = words.first_chunk::<CALL_WORDS>().copied().ok_or(Errno::EINVAL)?;
            let result = host.machine.call_words(&call);
            let out = words.first_chunk_mut::<RESULT_WORDS>().ok_or(Errno::EINVAL)?;
            *out = result;
            Ok(())
        }),
        request::TOUCH => with(host, process, argument, touch),
        request::GMEM_PFN => with(host, process, argument, gmem_pfn),
        request::MISBEHAVE => with(host, process, argument, |host, _, [bits]: &mut [u64; 1]| {
            host.misbehaviour = Misbehaviour::from_bits(*bits).ok_or(Errno::EINVAL)?;
            Ok(())
        }),
        request::ALLOC => with(host, process, argument, |host, _, [pfn, count]: &mut [u64; 2]| {
            let frame = host.frames.take_range(*count, Holder::Research).ok_or(Errno::ENOMEM)?;
            *pfn = frame.0;
            Ok(())
        }),
        request::FREE => with(host, process, argument, |host, _, [pfn, count]: &mut [u64; 2]| {
            free(host, Pfn(*pfn), *count)
        }),
        request::STATS => with(host, process, argument, |host, _, words: &mut [u64; 6]| {
            let census = host.frames.census();
            let counters = host.counters;
            *words = [
                census.free,
                census.used,
                census.pools,
                census.vms,
                counters.marked_aborts,
                counters.unshares,
            ];
            Ok(())
        }),
        request::VM_HANDLE => with(host, process, argument, |_, process, [vm, handle]: &mut [u64; 2]| {
            let file = process.files.get(*vm)?;
            let File::Vm(vm) = &*file else { return Err(Errno::EINVAL) };
            *handle = vm.handle().to_word();
            Ok(())
        }),
        request::SMC => with(host, process, argument, |host, _, words: &mut [u64; 4]| {
            *words = host.machine.smc(*words);
            Ok(())
        }),
        request::HVC_IMM => with(host, process, argument, |host, _, words: &mut [u64; 8]| {
            let [which, call @ ..] = words;
            let which_call = match which {
                1 => OddCall::Hvc1,
                2 => OddCall::Smc1,
                _ => return Err(Errno::EINVAL),
            };
            *which = host.machine.odd_call(which_call, call);
            Ok(())
        }),
        request::SERIES => with(host, process, argument, series),
        request::PLAY => with(host, process, argument, |host, process, [list, entries, rounds]| {
            play::play(host, process, *list, *entries, *rounds)
        }),
        request::COUNTER_AT_ENTRY => with(host, process, argument, |host, _, [count]: &mut [u64; 1]| {
            *count = host.machine.counter_at_entry();
            Ok(())
        }),
        request::HIDDEN => {
            with(host, process, argument, |host, _, [which, value, undefined, esr]: &mut [u64; 4]| {
                let register = Hidden::from_word(*which).ok_or(Errno::EINVAL)?;
                (*value, *undefined, *esr) = match host.machine.hidden(register) {
                    Ok(value) => (value, 0, 0),
                    Err(trap) => (0, 1, trap.esr),
                };
                Ok(())
            })
        }
        request::CPUS => with(host, process, argument, |host, _, [count]: &mut [u64; 1]| {
            *count = (host.machine.secondaries().len() as u64).saturating_add(1);
            Ok(())
        }),
        request::CPU_ON => {
            with(host, process, argument, |host, _, [cpu]: &mut [u64; 1]| cpus::turn_on(host.machine, *cpu))
        }
        request::CPU_OFF => {
            with(host, process, argument, |host, _, [cpu]: &mut [u64; 1]| cpus::turn_off(host.machine, *cpu))
        }
        request::CPU_PLAY => with(host, process, argument, cpu_play),
        request::CPU_PROGRESS => with(host, process, argument, |host, _, words: &mut [u64; 4]| {
            let [cpu, out @ ..] = words;
            host.machine.relax();
            let progress = cpus::secondary(host.machine, *cpu)?.progress();
            *out = [progress.state as u64, progress.rounds, progress.aborts];
            Ok(())
        }),
        request::CPU_END => with(host, process, argument, cpu_end),
        _ => Err(Errno::ENOTTY),
    }
}

fn cpu_play(host: &mut Host, process: &mut Process, words: &mut [u64; 5]) -> Result<(), Errno> {
    let [cpu, address, count, rounds, past_aborts] = *words;
    let records = read_records(host, process, address, count, secondary::MAX_RECORDS as u64)?;
    let secondary = cpus::secondary(host.machine, cpu)?;
    secondary.play(&records, How { rounds, past_aborts: past_aborts != 0 })?;
    host.machine.wake();
    Ok(())
}

fn cpu_end(host: &mut Host, process: &mut Process, words: &mut [u64; 6]) -> Result<(), Errno> {
    let [cpu, address, count, all, rounds, aborts] = words;
    let progress = cpus::end(host.machine, *cpu, *all != 0)?;
    (*rounds, *aborts) = (progress.rounds, progress.aborts);
    let results: Vec<Record> =
        cpus::secondary(host.machine, *cpu)?.results()?.take(*count as usize).collect();
    write_records(host, process, *address, results)
}

/// Reads the array, serves the request, writes the array back.
fn with<'m, const N: usize>(
    host: &mut Host<'m>,
    process: &mut Process,
    argument: u64,
    serve: impl FnOnce(&mut Host<'m>, &mut Process, &mut [u64; N]) -> Result<(), Errno>,
) -> Result<u64, Errno> {
    let address = |index: u64| argument.checked_add(index.saturating_mul(8)).ok_or(Errno::EFAULT);
    let mut words = [0; N];
    for (index, word) in (0..).zip(&mut words) {
        let mut bytes = [0; 8];
        process.space.read(host, address(index)?, &mut bytes)?;
        *word = u64::from_le_bytes(bytes);
    }
    serve(host, process, &mut words)?;
    for (index, word) in (0..).zip(words) {
        process.space.write(host, address(index)?, &word.to_le_bytes())?;
    }
    Ok(0)
}

/// The kernel's own load or store, through the linear map.
fn touch(host: &mut Host, _: &mut Process, words: &mut [u64; 6]) -> Result<(), Errno> {
    let [address, write, stored, results @ ..] = words;
    let kind = if *write == 0 { 1 } else { 2 };
    let [value, failed, esr, far, ..] = perform(host, &[kind, *address, *stored, 0, 0, 0, 0, 0, 0, 0])?;
    (*stored, *results) = (value, [failed, esr, far]);
    Ok(())
}

/// Does what a record says and counts its abort.
fn perform(host: &mut Host, record: &Record) -> Result<Record, Errno> {
    let step = Step::from_record(record).ok_or(Errno::EINVAL)?;
    let (results, abort) = step.perform(host.machine);
    if let Some(abort) = abort {
        host.note_abort(abort);
    }
    Ok(results)
}

/// Reads an array of records. EINVAL if there are more than `most`.
fn read_records(
    host: &mut Host,
    process: &mut Process,
    address: u64,
    count: u64,
    most: u64,
) -> Result<Vec<Record>, Errno> {
    if count > most {
        return Err(Errno::EINVAL);
    }
    let mut bytes = alloc::vec![0; (count as usize).saturating_mul(RECORD_BYTES)];
    process.space.read(host, address, &mut bytes)?;
    let words: Vec<u64> = bytes.as_chunks().0.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect();
    Ok(words.as_chunks().0.to_vec())
}

fn write_records(
    host: &mut Host,
    process: &mut Process,
    address: u64,
    records: impl IntoIterator<Item = Record>,
) -> Result<(), Errno> {
    let bytes: Vec<u8> = records.into_iter().flatten().flat_map(u64::to_le_bytes).collect();
    process.space.write(host, address, &bytes)
}

/// Does all records of an array, with one copy in and one out: what a program does thousands of times a second.
fn series(host: &mut Host, process: &mut Process, words: &mut [u64; 2]) -> Result<(), Errno> {
    let [address, count] = *words;
    let mut records = read_records(host, process, address, count, MAX_RECORDS)?;
    for record in &mut records {
        *record = perform(host, record)?;
    }
    write_records(host, process, address, records)
}

fn gmem_pfn(_: &mut Host, process: &mut Process, words: &mut [u64; 3]) -> Result<(), Errno> {
    let [descriptor, offset, pfn] = words;
    let file = process.files.get(*descriptor)?;
    let File::Gmem(view) = &*file else { return Err(Errno::EINVAL) };
    if !is_aligned(*offset) {
        return Err(Errno::EINVAL);
    }
    *pfn = view.inode().page(*offset / PAGE).ok_or(Errno::ENOENT)?.frame.0;
    Ok(())
}

/// Frees pages of this device. All of the range must be the device's: otherwise EINVAL; and EL2 must know them
/// as the host's own: otherwise EBUSY. Then nothing is freed.
fn free(host: &mut Host, first: Pfn, count: u64) -> Result<(), Errno> {
    let end = first.0.checked_add(count).ok_or(Errno::EINVAL)?;
    if (first.0..end).any(|number| host.frames.holder(Pfn(number)) != Some(Holder::Research)) {
        return Err(Errno::EINVAL);
    }
    for pfn in first.0..end {
        let state = host.call(HostCall::QueryPage { pfn }).ok().and_then(|result| result.host_state());
        if state.is_some_and(|state| state != HostState::Owned) {
            return Err(Errno::EBUSY);
        }
    }
    for number in first.0..end {
        host.give_back(Pfn(number));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::request;

    #[test]
    fn the_numbers_are_those_of_the_contract() {
        assert_eq!(request::CALL, 0xc090_4400);
        assert_eq!(request::TOUCH, 0xc030_4401);
        assert_eq!(request::GMEM_PFN, 0xc018_4402);
        assert_eq!(request::MISBEHAVE, 0xc008_4403);
        assert_eq!(request::ALLOC, 0xc010_4404);
        assert_eq!(request::FREE, 0xc010_4405);
        assert_eq!(request::STATS, 0xc030_4406);
        assert_eq!(request::VM_HANDLE, 0xc010_4407);
        assert_eq!(request::SMC, 0xc020_4408);
        assert_eq!(request::HVC_IMM, 0xc040_4409);
        assert_eq!(request::SERIES, 0xc010_440a);
        assert_eq!(request::PLAY, 0xc018_440b);
        assert_eq!(request::COUNTER_AT_ENTRY, 0xc008_440c);
        assert_eq!(request::HIDDEN, 0xc020_440d);
        assert_eq!(request::CPUS, 0xc008_440e);
        assert_eq!(request::CPU_ON, 0xc008_440f);
        assert_eq!(request::CPU_OFF, 0xc008_4410);
        assert_eq!(request::CPU_PLAY, 0xc028_4411);
        assert_eq!(request::CPU_PROGRESS, 0xc020_4412);
        assert_eq!(request::CPU_END, 0xc030_4413);
    }
}
