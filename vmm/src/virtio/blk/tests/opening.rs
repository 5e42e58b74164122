//! What can be a disk, what a disk says of itself, and what can't be one.

use tempfile::NamedTempFile;

use super::*;
use crate::virtio::testing::Driver;

#[test]
fn an_image_has_a_serial_number_of_its_own() {
    let (one, other) = (image(), image());
    let serial = |file| *Disk::open(&spec(file)).unwrap().image.serial();
    assert_eq!(serial(&one), serial(&one));
    assert_ne!(serial(&one), serial(&other));
}

#[test]
fn an_image_has_one_writer_or_several_readers() {
    let file = image();
    let reader = DiskSpec {
        readonly: true,
        ..spec(&file)
    };
    let writer = Disk::open(&spec(&file)).unwrap();
    for spec in [&spec(&file), &reader] {
        let error = Disk::open(spec).unwrap_err();
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(source.contains("in use by process"), "{source}");
    }
    drop(writer);
    let _one = Disk::open(&reader).unwrap();
    let _two = Disk::open(&reader).unwrap();
    Disk::open(&spec(&file)).unwrap_err();
}

#[test]
fn a_disk_that_is_let_go_of_can_be_had_again_at_once() {
    for engine in ENGINES {
        let file = image();
        for _ in 0..50 {
            let mut running = Running::open(&with_engine(&file, engine));
            assert_eq!(running.read(0, 4096).0, OK);
        }
    }
}

#[test]
fn the_configuration_space_tells_the_disk() {
    let file = image();
    let disk = Disk::open(&DiskSpec {
        num_queues: 3,
        queue_size: 64,
        ..spec(&file)
    })
    .unwrap();
    assert_eq!(disk.kind().id(), 2);
    assert_eq!(disk.queue_sizes(), [64; 3]);
    assert_eq!(disk.features() >> spec::VIRTIO_BLK_F_MQ & 1, 1);
    let number = |offset, len| {
        let mut bytes = [0; 8];
        disk.config_read(offset, &mut bytes[..len]);
        u64::from_le_bytes(bytes)
    };
    assert_eq!(number(0, 8), 8192);
    assert_eq!(number(8, 4), 0);
    assert_eq!(number(12, 4), 62);
    assert_eq!(number(20, 4), 512);
    assert_eq!(number(34, 2), 3);
    assert_eq!(number(36, 4), u64::from(MOST_DISCARD_SECTORS));
    assert_eq!((number(40, 4), number(44, 4)), (1, 1));
    assert_eq!(number(48, 4), u64::from(MOST_ZEROES_SECTORS));
    assert_eq!((number(52, 4), number(56, 1)), (1, 1));
    assert_eq!(number(60, 4), 0);
    assert_eq!(number(u64::MAX, 4), 0);
}

fn refusal(spec: &DiskSpec) -> String {
    let error = Disk::open(spec).unwrap_err();
    assert!(error.to_string().starts_with("disk _disk0"), "{error}");
    error.to_string()
}

#[test]
fn what_is_not_a_disk_is_named_with_what_mends_it() {
    let dir = tempfile::tempdir().unwrap();
    let at = |path: &std::path::Path| DiskSpec::new("_disk0", path);
    let socket = dir.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    for (path, says) in [
        (dir.path().join("none"), "truncate -s 10G"),
        (dir.path().to_owned(), "is a directory"),
        ("/dev/null".into(), "can be a --pmem"),
        (socket, "vhost_user=on"),
        ("/dev/null/below".into(), "can't be opened"),
    ] {
        let text = refusal(&at(&path));
        assert!(text.contains(says), "{text}");
        assert!(text.contains(path.to_str().unwrap()), "{text}");
    }
    // Read-only for root too.
    let text = refusal(&at("/sys/kernel/uevent_seqnum".as_ref()));
    assert!(text.contains("give readonly=on"), "{text}");
    let text = refusal(&DiskSpec {
        direct: true,
        readonly: true,
        ..at("/sys/kernel/uevent_seqnum".as_ref())
    });
    assert!(text.contains("leave direct=on out"), "{text}");
}

#[test]
fn an_image_without_a_block_is_refused_and_a_part_of_one_is_left_out() {
    let file = NamedTempFile::new().unwrap();
    for len in [0, 511] {
        file.as_file().set_len(len).unwrap();
        assert!(refusal(&spec(&file)).contains("less than one block"));
    }
    file.as_file().set_len(1500).unwrap();
    let mut running = Running::open(&spec(&file));
    assert_eq!(running.disk.size(), 1024);
    assert_eq!(running.read(1, 512).0, OK);
    assert_eq!(running.write(2, &[1; 512]), IO_ERROR);
    running.driver.stop();
    assert_eq!(file.as_file().metadata().unwrap().len(), 1500);
}

#[test]
fn numbers_that_no_disk_has_are_refused() {
    let file = image();
    for (num_queues, queue_size) in [(0, 128), (257, 128), (1, 0), (1, 2), (1, 100), (1, 32769)] {
        let text = refusal(&DiskSpec {
            num_queues,
            queue_size,
            ..spec(&file)
        });
        assert!(text.contains("can't be: give"), "{text}");
    }
    for serial in ["twenty-one-characters", "caf\u{e9}"] {
        let text = refusal(&DiskSpec {
            serial: Some(serial.into()),
            ..spec(&file)
        });
        assert!(text.contains("at most 20 bytes of ASCII"), "{text}");
    }
}

#[test]
fn threads_are_named_after_disk_and_queue() {
    assert_eq!(thread_name("_disk0", 0), "_disk0_q0");
    assert_eq!(thread_name("data", 12), "_data_q12");
    assert_eq!(thread_name("a-very-long-name", 255), "_a-very-lo_q255");
    assert!(thread_name("1234567\u{e9}\u{e9}\u{e9}\u{e9}", 0).len() <= 15);
}

#[test]
fn a_disk_that_can_only_be_read_is_only_read() {
    let file = image();
    let before = file_bytes(&file, 0, 4 << 20);
    let disk = Disk::open(&DiskSpec {
        readonly: true,
        ..spec(&file)
    })
    .unwrap();
    let has = |bit: u32| disk.features() >> bit & 1 == 1;
    assert!(has(spec::VIRTIO_BLK_F_RO));
    assert!(!has(spec::VIRTIO_BLK_F_DISCARD) && !has(spec::VIRTIO_BLK_F_WRITE_ZEROES));
    let mut running = Running::new(disk);
    assert_eq!(running.write(0, &[1; 512]), IO_ERROR);
    assert_eq!(running.range(11, 0, 8, 0), IO_ERROR);
    assert_eq!(running.range(13, 0, 8, 1), IO_ERROR);
    assert_eq!(running.read(5, 512).0, OK);
    assert_eq!(running.flush(), OK);
    assert_eq!(file_bytes(&file, 0, 4 << 20), before);
}

#[test]
fn a_driver_may_leave_queues_out_but_not_all() {
    let file = image();
    let disk = Disk::open(&DiskSpec {
        num_queues: 2,
        ..spec(&file)
    })
    .unwrap();
    let driver = Driver::new(&disk);
    let mut activation = driver.activation(0);
    activation.queues[0] = None;
    assert_eq!(disk.workers(activation).unwrap().len(), 1);
    let mut activation = driver.activation(0);
    activation.queues.clear();
    let refused = disk.workers(activation).err().unwrap();
    assert!(matches!(refused, ActivateError::MissingQueue { .. }));
}
