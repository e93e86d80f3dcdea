//! The storage by itself: any bytes, in memory of any shape.

use libc::iovec;

use super::*;
use crate::block::crypt::luks::Place;
use crate::block::crypt::{CryptStorage, Keys, Unlocked};
use crate::block::error::ErrorKind;
use crate::block::sim::{Event, Sim, SimStorage, random};
use crate::block::tests::{pattern, read, write};
use crate::block::{FileOptions, FileStorage, Storage};
use crate::reactor::Sg;

const SIZE: usize = 700_000;

fn crypt(f: &Folder, below: Storage) -> Storage {
    let spec = f.spec("a.luks", Format::Luks);
    let keys = Keys::load(&spec.keys).unwrap();
    let place = Place {
        offset: 0,
        len: below.len(),
    };
    let key =
        f.io.block_on(Unlocked::open(&f.io, &below, place, &keys, None));
    let key = key.unwrap();
    let payload = key.payload();
    Storage::Crypt(Box::new(CryptStorage::new(Arc::new(below), key, payload)))
}

fn file(f: &Folder, direct: bool, block: usize) -> Storage {
    f.create("a.luks", SIZE.next_multiple_of(4096));
    let options = FileOptions {
        read_only: false,
        direct,
    };
    let mut file = FileStorage::open(f.at("a.luks"), options).unwrap();
    if block > 0 {
        file.pretend_blocks_of(block);
    }
    crypt(f, Storage::File(file))
}

/// Random ranges of bytes against a model.
fn bytes_of_chance(f: &Folder, storage: &Storage, seed: u64) {
    let size = storage.len() as usize;
    let mut model = pattern(size, seed);
    write(&f.io, storage, 0, &model).unwrap();
    let mut rng = seed + 1;
    for n in 0..150 {
        let mut pick = |n: usize| (random(&mut rng) % n as u64) as usize;
        let most = if pick(8) == 0 { size } else { 3000 };
        let offset = pick(size);
        let len = (1 + pick(most)).min(size - offset);
        let place = offset..offset + len;
        match pick(5) {
            0 => {
                let zeroed = storage.write_zeroes(&f.io, offset as u64, len as u64, n % 2 == 0);
                f.io.block_on(zeroed).unwrap();
                model[place].fill(0);
            }
            1 | 2 => {
                let data = pattern(len, seed + n);
                write(&f.io, storage, offset as u64, &data).unwrap();
                model[place].copy_from_slice(&data);
            }
            _ => assert!(read(&f.io, storage, offset as u64, len).unwrap() == model[place]),
        }
    }
    assert!(read(&f.io, storage, 0, size).unwrap() == model);
}

#[test]
fn any_bytes_are_read_and_written_on_devices_of_any_block() {
    let f = Folder::new();
    for (seed, (direct, block)) in (1..).zip([(false, 0), (true, 0), (true, 4096)]) {
        let storage = file(&f, direct, block);
        bytes_of_chance(&f, &storage, seed);
    }
}

#[test]
fn pieces_of_memory_of_any_length_and_place() {
    let f = Folder::new();
    let storage = file(&f, true, 0);
    let model = pattern(storage.len() as usize, 5);
    write(&f.io, &storage, 0, &model).unwrap();
    let mut rng = 6;
    for _ in 0..40 {
        let mut pick = |n: usize| (random(&mut rng) % n as u64) as usize;
        let mut parts: Vec<Vec<u8>> = (0..1 + pick(9)).map(|_| vec![0; pick(2000)]).collect();
        let sum: usize = parts.iter().map(Vec::len).sum();
        parts.push(vec![0; sum.next_multiple_of(512) - sum + 512]);
        let list: Vec<iovec> = parts
            .iter_mut()
            .map(|part| iovec {
                iov_base: part.as_mut_ptr().cast(),
                iov_len: part.len(),
            })
            .collect();
        // SAFETY: the vectors outlive the list and are not touched meanwhile.
        let sg = unsafe { Sg::new(&list) };
        let offset = pick(1000) * 512;
        let place = offset..offset + sg.len();
        // Two under way at once, the other one in a buffer.
        let mut buf = f.io.buf(4096);
        f.io.block_on(async {
            let first = storage.begin_read(&f.io, offset as u64, sg);
            let second = storage.begin_read(&f.io, 512, buf.sg());
            second.finish(&f.io).await.unwrap();
            first.finish(&f.io).await.unwrap();
        });
        assert!(buf[..] == model[512..512 + 4096]);
        assert!(parts.concat() == model[place.clone()]);
        // SAFETY: as above.
        let sg = unsafe { Sg::new(&list) };
        let written = f.io.block_on(async {
            let pending = storage.begin_write(&f.io, offset as u64, sg);
            pending.finish(&f.io).await
        });
        written.unwrap();
        assert!(read(&f.io, &storage, offset as u64, place.len()).unwrap() == model[place]);
    }
    assert!(read(&f.io, &storage, 0, model.len()).unwrap() == model);
}

#[test]
fn neighbours_in_one_sector_do_not_undo_each_other() {
    let f = Folder::new();
    f.create("a.luks", 4096);
    let sim = Sim {
        delay: 3,
        ..Sim::default()
    };
    let image = std::fs::read(f.at("a.luks")).unwrap();
    let storage = Arc::new(crypt(&f, Storage::Sim(SimStorage::new(image, sim))));
    write(&f.io, &storage, 0, &[0; 4096]).unwrap();
    let left = std::rc::Rc::new(std::cell::Cell::new(16));
    for n in 0..16u8 {
        let (io, storage, left) = (f.io.clone(), storage.clone(), left.clone());
        f.io.spawn(async move {
            let mut buf = io.buf(64);
            buf.fill(n + 1);
            storage
                .write(&io, u64::from(n) * 64, buf.sg())
                .await
                .unwrap();
            left.set(left.get() - 1);
        });
    }
    while left.get() > 0 {
        if !f.io.turn() {
            f.io.park(None);
        }
    }
    let want: Vec<u8> = (0..1024).map(|n| (n / 64 + 1) as u8).collect();
    assert!(read(&f.io, &storage, 0, 1024).unwrap() == want);
}

#[test]
fn beyond_the_end_are_zeros_and_zeros_are_written_as_ciphertext() {
    let f = Folder::new();
    f.create("a.luks", 8192);
    let image = std::fs::read(f.at("a.luks")).unwrap();
    let sim = SimStorage::new(image, Sim::default());
    let storage = crypt(&f, Storage::Sim(sim));
    let data = pattern(8192, 1);
    write(&f.io, &storage, 0, &data).unwrap();
    let shown = read(&f.io, &storage, 4096, 8192).unwrap();
    assert!(shown[..4096] == data[4096..] && shown[4096..] == [0; 4096]);
    assert!(read(&f.io, &storage, 100_000, 513).unwrap() == [0; 513]);
    let Storage::Crypt(crypt) = &storage else {
        panic!("encrypted");
    };
    let Storage::Sim(sim) = crypt.below() else {
        panic!("simulated");
    };
    sim.take_events();
    f.io.block_on(async {
        storage.write_zeroes(&f.io, 0, 4096, true).await.unwrap();
        storage.discard(&f.io, 4096, 4096).await.unwrap();
        assert!(
            !storage.allocate(&f.io, 8192, 4096).await.unwrap(),
            "no zeros are promised"
        );
        storage.set_len(&f.io, 16_384).await.unwrap();
    });
    let payload = 2_068_480;
    let events = sim.take_events();
    let at = |offset: u64, len| (offset + payload, len);
    assert!(
        matches!(
            events[..],
            [
                Event::Write { offset: w, len: wl },
                Event::Allocate { offset: a, len: al },
                Event::SetLen { len },
            ] if (w, wl) == at(0, 4096) && (a, al) == at(8192, 4096) && len == payload + 16_384
        ),
        "{events:?}"
    );
    let start = payload as usize;
    assert!(
        sim.image()[start..start + 4096] != [0; 4096],
        "encrypted zeros"
    );
    assert!(read(&f.io, &storage, 0, 4096).unwrap() == [0; 4096]);
    assert!(read(&f.io, &storage, 4096, 4096).unwrap() == data[4096..]);
}

#[test]
fn ranges_beyond_what_a_file_can_hold_are_errors() {
    let f = Folder::new();
    let storage = file(&f, false, 0);
    for offset in [
        u64::MAX,
        u64::MAX - 700,
        u64::MAX / 512 * 512,
        i64::MAX as u64 - 4,
    ] {
        for len in [1, 512, 1024] {
            let error = read(&f.io, &storage, offset, len).err();
            // Nothing is there, as behind the end of any file, unless no file reaches there.
            assert!(error.is_none_or(|error| error.kind() == ErrorKind::OutOfRange));
            let error = write(&f.io, &storage, offset, &vec![1; len]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::OutOfRange, "{offset} {len}");
            let zeroed = storage.write_zeroes(&f.io, offset, len as u64, false);
            let error = f.io.block_on(zeroed).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::OutOfRange, "{offset} {len}");
        }
    }
}
