package main

// errcode.go is the one home of the error codes: each stands here once, with when it occurs and what to do about it,
// and is raised at one place, so that a code in a log leads to one line of the source. The codes never change meaning
// (PROTOCOL section 12). It also owns the error type that carries a code; who raises which is the other files' affair.

import (
	"errors"
	"fmt"
	"log/slog"
)

// An errCode is what a user searches for in the README.
type errCode string

// Processes.
const (
	// The command of a task or an exec could not be started. Check that the program exists, may be executed and is on the PATH.
	codeExec errCode = "ERR-303509T3200"
	// The worker process died or could not be started; it is started again. Look at the lines before it in the log.
	codeChild errCode = "ERR-60350903200"
)

// The host.
const (
	// A part of the hardware reports could not be read, as in a container without /proc, and is left out; everything else goes
	// on. Logged once for each part and reason. Give the process what the line names, or ignore it.
	codeHardware errCode = "ERR-30350903208"
)

// The program itself.
const (
	// A newer version that the manager offers could not be fetched, is not what the manager says, does not run here or did
	// not stay healthy on trial. The old one works on; what could pass is tried again later, everything else when the manager
	// offers something else. The line says what is wrong.
	codeUpdate errCode = "ERR-25230903100"
)

// Worker.
const (
	// A message on a job's subject is no task: not JSON, too large, with an id that cannot name a file, or with an unknown
	// action. It is acknowledged and never run. Mend whoever sent it.
	codeMessage errCode = "ERR-26112300901"
	// A message on {task_id}_worker is no JSON, is about another task, or asks for neither timeout nor terminate. Nothing
	// was done; mend whoever sent it.
	codeControl errCode = "ERR-26112300902"
	// A task was started max_deliveries times and took its worker down each time. It ends with error; find out what the
	// command does to the host before it is sent again.
	codeGivenUp errCode = "ERR-26112300903"
	// The job's folder holds a file with the name of the task's data file that is not the task's. Nothing is overwritten;
	// use task ids that are no names of your files, such as UUIDs.
	codeDataFile errCode = "ERR-26112300904"
	// A task's data file could not be written. Check that working_dir exists, may be written to and has room.
	codeDataFileWrite errCode = "ERR-26112300905"
	// A task was created with data that is not JSON or is larger than a message may be (16 MiB). Put large data in a file
	// or a store, and its place in the task.
	codeCreateBody errCode = "ERR-26112300908"
)

// Brokers.
const (
	// The configuration, or the manager, names a type of broker that this build does not know.
	codeBrokerType errCode = "ERR-26112301001"
)

// The processes around the worker.
const (
	// The REST API's port could not be opened. Another program holds it, or the address is not this host's: change listen.
	codeListen errCode = "ERR-26112300801"
	// The open port could not be kept for the worker process. The system is out of descriptors.
	codeSocket errCode = "ERR-26112300802"
	// A child process was started with --supervised and without a parent that talks to it. Leave the flag out.
	codeLifeline errCode = "ERR-26112300803"
	// A child process has said for a minute that it makes no progress, or has said nothing, and is started anew; its tasks run
	// again. A host that is far too busy can be the reason; otherwise report it, with the log of the minutes before.
	codeChildSilent errCode = "ERR-26112300804"
	// run was asked for an event that the configuration does not have.
	codeRunEvent errCode = "ERR-26112300805"
	// run could not make a folder for its task. Check the folder for temporary files ($TMPDIR).
	codeRunFolder errCode = "ERR-26112300806"
)

// Background processes.
const (
	// An exec has ended with an exit code other than 0 or was killed by a signal; it is started again after the pause that
	// the line names. Its own lines in the log, before this one, say more.
	codeExecFailed errCode = "ERR-26112300850"
	// An exec has failed and is not started again: its attempt restarts in a row are used up. Mend what the lines before
	// say; it starts anew when its entry changes or job_item is restarted.
	codeExecGivenUp errCode = "ERR-26112300851"
	// data_dir does not take the notes about the execs' processes, so what a killed job_item leaves of them is not ended
	// by the next one. Check that the folder may be written to and has room.
	codeExecLedger errCode = "ERR-26112300852"
	// What execs had started under a killed job_item could not be ended, and runs beside what is started now. Look at the
	// named processes, and end them by hand.
	codeExecLeft errCode = "ERR-26112300853"
)

// The parent and the system.
const (
	// NOTIFY_SOCKET is no address of a Unix socket, so the service manager is told nothing. It sets the variable itself; unset
	// it where job_item is started by something else.
	codeNotifySocket errCode = "ERR-26112300860"
	// WATCHDOG_USEC or WATCHDOG_PID cannot be read, so the service manager's watchdog gets no sign of life. They come from
	// WatchdogSec=; unset them where job_item is started by something else.
	codeWatchdog errCode = "ERR-26112300861"
	// The service manager did not take a message, such as that the worker is ready or alive. The work goes on; look at the
	// service manager, and whether the socket of NOTIFY_SOCKET can be reached from here.
	codeNotifySend errCode = "ERR-26112300862"
	// The system does not make the parent the one that orphaned processes go to. It works without; what a killed worker's
	// tasks have left is then ended a moment later, when the next worker starts.
	codeSubreaper errCode = "ERR-26112300863"
)

// Command templates.
const (
	// A job's cmd is not a template that can be run: a tag or a quote is not closed, a section not ended, a partial is
	// named, or nothing is left of it. Correct cmd in the configuration.
	codeTemplate errCode = "ERR-26112300301"
	// A value stands where its text would be read as code, such as inside $(…) or in the script of sh -c. Move the tag,
	// or pass the value as an argument: sh -c '… "$1"' sh {{name}}.
	codeTemplatePlace errCode = "ERR-26112300302"
	// The data of a task lacks a variable that the command names. Send it, or put the tag into a section: {{#name}}…{{/name}}.
	codeTemplateMissing errCode = "ERR-26112300303"
	// The data of a task cannot fill a command: it is no JSON, or makes a command longer than any system can start.
	codeTemplateData errCode = "ERR-26112300304"
)

// Journal.
const (
	// The journal in data_dir could not be opened or read. Check that the folder belongs to the worker's user and that
	// the disk is sound.
	codeJournalOpen errCode = "ERR-26112300201"
	// Another worker has this data_dir open. Let it end, or give this one a data_dir of its own.
	codeJournalBusy errCode = "ERR-26112300202"
	// The journal was written by a newer version of job_item; nothing in it was changed. Run that version again, or
	// give this one another data_dir.
	codeJournalVersion errCode = "ERR-26112300203"
	// The journal could not be written, so no task is accepted until it can. Free some space in data_dir, or look for
	// a failing disk; the worker tries again every second.
	codeJournalWrite errCode = "ERR-26112300204"
	// A task's data could not be read back from the journal. Look for a failing disk, and create the task again.
	codeJournalRead errCode = "ERR-26112300205"
	// The journal was asked for something that does not fit the task: it does not hold it, holds it already, or its
	// data is too large. A task of over 16 MiB has to be made smaller; anything else is a defect worth reporting.
	codeJournalTask errCode = "ERR-26112300206"
)

// Configuration.
const (
	// The configuration file could not be read, or is larger than 1 MiB. Check the path and who may read it.
	codeConfigFile errCode = "ERR-26112300101"
	// The configuration is not valid. Each line of the message names a place, its key and what would be right.
	codeConfig errCode = "ERR-26112300102"
)

// Processes of a dead worker.
const (
	// What a crashed worker's task had left running could not be ended. Look at the named processes: they wait for a
	// dead disk or network share, or belong to another user. End them by hand; until then the task does not run again.
	codeStaleGroup errCode = "ERR-26112300401"
)

// Task records.
const (
	// The records in data_dir could not be opened at start. Check that the folder may be read and written.
	codeRecordsOpen errCode = "ERR-26112300601"
	// Records, logs or notifications could not be written; tasks go on, and what is missing is marked. Usually the disk
	// is full or read-only. Logged when it begins, at most once a minute.
	codeRecordWrite errCode = "ERR-26112300602"
	// A record, log or file of a task could not be read back. Look at the cause; other records are not affected.
	codeRecordRead errCode = "ERR-26112300603"
	// No task of that id is known here: never created, or older than retain allows.
	codeRecordUnknown errCode = "ERR-26112300604"
	// Not a task id: 1 to 128 of A-Z a-z 0-9 . _ -, no dot first.
	codeRecordTaskID errCode = "ERR-26112300605"
	// The result that was handed in is not JSON.
	codeRecordResult errCode = "ERR-26112300606"
	// A result or file is too large, or the task has too many: 16 MiB a result, 1 GiB and 100 files a task.
	codeRecordTooLarge errCode = "ERR-26112300607"
	// An uploaded file has a name that cannot be kept everywhere: a path, a leading dot, control or reserved characters.
	codeRecordFileName errCode = "ERR-26112300608"
	// An uploaded file could not be stored, or its sender broke off. Check the room on the disk of data_dir.
	codeRecordFile errCode = "ERR-26112300609"
	// The task has left no such file, or its data was not kept.
	codeRecordNotKept errCode = "ERR-26112300610"
	// A task's result or data could not be written. Check the room on the disk of data_dir.
	codeRecordFolder errCode = "ERR-26112300611"
)

// REST API.
const (
	// The REST API could not be served on its address any more. The worker restarts it; look at the cause.
	codeHTTPServe errCode = "ERR-26112300501"
	// The server listens on a loopback address and the request's Host header names something else. Call it as localhost
	// or 127.0.0.1; through a proxy, let that set the Host header so.
	codeHTTPHost errCode = "ERR-26112300502"
	// A web page of another origin called the server through a browser on this host.
	codeHTTPOrigin errCode = "ERR-26112300503"
	// The body's Content-Type is not what the call takes: application/json, or multipart/form-data for files.
	codeHTTPContentType errCode = "ERR-26112300504"
	// The key is missing or wrong. Send Authorization: Bearer <secret_key>.
	codeHTTPKey errCode = "ERR-26112300505"
	// The server listens on more than loopback and has no key, so it serves /health only. Configure a key, or listen on
	// 127.0.0.1.
	codeHTTPNoKey errCode = "ERR-26112300506"
	// There is nothing at this path.
	codeHTTPPath errCode = "ERR-26112300507"
	// The path exists, but not with this method; the Allow header says with which.
	codeHTTPMethod errCode = "ERR-26112300508"
	// The request is malformed; the message says where.
	codeHTTPBadRequest errCode = "ERR-26112300509"
	// The body, or a message, result or file in it, is larger than the call takes.
	codeHTTPTooLarge errCode = "ERR-26112300510"
	// The body did not come in time.
	codeHTTPBodySlow errCode = "ERR-26112300511"
	// No job of this worker has that event. Look at jobs: in its configuration.
	codeHTTPEvent errCode = "ERR-26112300512"
	// The task has ended, so it cannot be terminated.
	codeHTTPEnded errCode = "ERR-26112300513"
	// The worker cannot take a job just now: starting, broker away, or the journal cannot be written. Try again.
	codeHTTPAway errCode = "ERR-26112300514"
	// Something failed inside the worker; its log has the cause.
	codeHTTPInternal errCode = "ERR-26112300515"
	// With end_point set, results and files are the Job Manager's. Use JOB_MANAGER_RESULT_URL and JOB_MANAGER_UPLOAD_FILE.
	codeHTTPNotOurs errCode = "ERR-26112300516"
	// Too many events or logs are being read at once: 64 and 256. Close some readers.
	codeHTTPReaders errCode = "ERR-26112300517"
)

// Commands inside jobs and for people.
const (
	// A variable that the worker sets for a job is missing. Run the command inside a job, or set it as the hint shows.
	codeTaskVariables errCode = "ERR-26112300701"
	// A task id is not one. Use 1 to 128 of A-Z a-z 0-9 . _ -, not starting with a dot.
	codeTaskID errCode = "ERR-26112300702"
	// The URL in a variable of the job is not an absolute http or https URL. Correct the variable.
	codeTaskURL errCode = "ERR-26112300703"
	// save could not deliver a message; it and all later ones are lost, the copied output is complete. The text says
	// what the receiver answered, or that it did not for 30 s: check JOB_ITEM_MSG_NOTIF_HOST and the worker's log.
	codeSend errCode = "ERR-26112300704"
	// save could not read its input to the end, or not write to its output (a full disk). What was read has been sent.
	codeCopy errCode = "ERR-26112300705"
	// The command after `save --` could not be started. Check that the program exists, may be executed and is on the PATH.
	codeSaveCommand errCode = "ERR-26112300706"
	// A command was given the wrong arguments. See job_item help.
	codeUsage errCode = "ERR-26112300707"
	// The data for a new task is not a JSON object. Correct --data.
	codeClientData errCode = "ERR-26112300708"
	// The JSON given as file or stdin could not be read, or is larger than 16 MiB.
	codeClientRead errCode = "ERR-26112300709"
	// Neither --url nor JOB_ITEM_BASE_URL is given and the configuration cannot be loaded. Name one of them.
	codeNoWorkerURL errCode = "ERR-26112300710"
	// The worker's URL is not an absolute http or https URL. Correct --url, JOB_ITEM_BASE_URL or listen.
	codeWorkerURL errCode = "ERR-26112300711"
	// No worker answers at its URL. Start it, or say with --url where it listens.
	codeUnreachable errCode = "ERR-26112300712"
	// The worker refused a request and gave no code of its own. The text says why.
	codeRefused errCode = "ERR-26112300713"
	// Something answers at the worker's URL, but not as a worker does. Check the URL.
	codeStrangeReply errCode = "ERR-26112300714"
	// Only a task that has ended can be replayed. Wait for its end, or create a new one.
	codeNotEnded errCode = "ERR-26112300715"
	// The data of the task to be replayed is no longer kept (retain). Create the task anew with its data.
	codeDataGone errCode = "ERR-26112300716"
	// The output of a task that is waited for could not be written. The task goes on; its log is kept by the worker.
	codeWaitOutput errCode = "ERR-26112300717"
	// A file could not be uploaded. The text says what the receiver answered, or why the file could not be read.
	codeUpload errCode = "ERR-26112300718"
	// The result is not JSON. Correct it.
	codeResultData errCode = "ERR-26112300719"
	// The result could not be sent. The text says what the receiver answered.
	codeResult errCode = "ERR-26112300720"
)

// Publishing a version.
const (
	// sign could not make a new key. It never overwrites a file: name one that does not exist, in a folder that takes it.
	codeNewKey errCode = "ERR-26112300880"
	// The private key could not be read, or is no Ed25519 key in PEM (PKCS #8, not encrypted). Make one with
	// `job_item sign --new-key FILE`.
	codePrivateKey errCode = "ERR-26112300881"
	// Others than its owner may read or write the private key's file, and who has the key decides what the workers run.
	// chmod 600 it, and make a new key if anybody may have read it.
	codeKeyExposed errCode = "ERR-26112300882"
	// A binary to sign or to check could not be read, is empty, or is larger than 256 MiB. Name the file that is to be
	// published.
	codeSignedFile errCode = "ERR-26112300883"
	// `sign --check`: that key has not signed that file so. The file, the key or the signature is another; sign the file
	// again and compare.
	codeSignature errCode = "ERR-26112300884"
	// The public key after --check is not one. `job_item sign --key FILE` prints it: 32 bytes in standard base64.
	codePublicKey errCode = "ERR-26112300885"
	// sign could not print a signature, such as to a file on a full disk. What is there is not complete; sign again.
	codeSignOutput errCode = "ERR-26112300886"
)

// Job Manager.
const (
	// The manager did not answer: nothing listens there, the name is unknown, TLS failed, or the reply broke off or is too
	// large. The worker asks again, and what runs goes on. Check end_point and the network.
	codeManagerAway errCode = "ERR-26112301401"
	// The manager answered with another status than 200. 401 or 403: check credential; 404: check end_point; 5xx: look at
	// the manager's log. The worker asks again.
	codeManagerStatus errCode = "ERR-26112301402"
	// The manager's answer is not usable: not JSON, without "return", or with a broker that cannot be one. The text names
	// what is wrong; the worker keeps what it has and asks again.
	codeManagerReply errCode = "ERR-26112301403"
	// The manager names a TLS file outside of the configuration's folder and data_dir. Name the same path under
	// broker_connection in the configuration file to allow it, or correct the manager.
	codeManagerPath errCode = "ERR-26112301404"
	// The manager's answer could not be kept in data_dir, so a start without the manager is not possible. Check the folder.
	codeManagerRemember errCode = "ERR-26112301405"
	// The manager does not answer and there is no kept answer that can be used. The worker starts when the manager does.
	codeManagerRemembered errCode = "ERR-26112301406"
	// The manager's archive of TLS files was refused whole: an entry that would land elsewhere, a link, too many or too
	// large ones, or no archive at all. Nothing was unpacked. Check what the manager has for this broker.
	codeCertificateArchive errCode = "ERR-26112301407"
	// The manager's TLS files could not be written. Let the worker's user write into the named folder, or put them there.
	codeCertificateWrite errCode = "ERR-26112301408"
	// A TLS file for the broker is missing, not PEM, expired, not valid yet, or does not fit its key. Replace the named file.
	codeTLSFile errCode = "ERR-26112301409"
)

// NATS.
const (
	// A server in host is not host or host:port. Put logins into user, password and token, and no URL into host.
	codeNATSServer errCode = "ERR-26112301101"
	// The server could not be reached. Check host and port, that it runs, and that no firewall stands between.
	codeNATSConnect errCode = "ERR-26112301102"
	// The server refused the login. Check auth_type, user, password and token against the server's configuration.
	codeNATSLogin errCode = "ERR-26112301103"
	// TLS failed: a certificate is not trusted, has expired, names another host or is missing, or one side uses TLS and the
	// other does not. Check secure, ca_file, cert_file and key_file.
	codeNATSTLS errCode = "ERR-26112301104"
	// Something is connected but does not answer as a NATS server does. Check the port, and the server's log.
	codeNATSAnswer errCode = "ERR-26112301105"
	// Nothing could be published because there is no connection; the text says why. Events wait and are sent later.
	codeNATSAway errCode = "ERR-26112301106"
	// The connection was lost, or the server did not answer any more. The worker connects again.
	codeNATSLost errCode = "ERR-26112301107"
	// The server did not confirm what was published: it may or may not have arrived, and is sent again.
	codeNATSUnconfirmed errCode = "ERR-26112301108"
	// A message is larger than the server's max_payload. Make it smaller, or raise max_payload on the server.
	codeNATSTooLarge errCode = "ERR-26112301109"
	// The server does not permit this login to publish on that subject. Extend its permissions.
	codeNATSPermission errCode = "ERR-26112301110"
	// A task was published that no worker listens for, or that its stream refused (it may be full). Start a worker with
	// that job, or look at the stream's limits.
	codeNATSTask errCode = "ERR-26112301111"
	// A message could not be published for another reason, which the text says.
	codeNATSPublish errCode = "ERR-26112301112"
	// durable needs JetStream, and the server has it not enabled (for this account), or it does not answer. Start
	// nats-server with -js, or leave durable out.
	codeNATSJetStream errCode = "ERR-26112301113"
	// The stream or consumer of a job's subject could not be made or used. The text says what stands in the way; remove
	// what conflicts, or raise the account's limits. The worker tries again.
	codeNATSStream errCode = "ERR-26112301114"
	// The server did not confirm that a task was acknowledged or put back. It delivers the task again, and a worker that
	// has finished it only reports it again.
	codeNATSSettle errCode = "ERR-26112301115"
	// --dry-run could log in, but the server did not answer after that. Look at the server.
	codeNATSProbe errCode = "ERR-26112301116"
	// A task that came over plain NATS was lost: the journal could not be written for so long that no more fit into
	// memory, or until the worker stopped and no other was there. Free some space in data_dir, and send it again; with
	// durable: true the broker would have kept it.
	codeNATSTaskLost errCode = "ERR-26112300870"
)

// RabbitMQ.
const (
	// No connection to the RabbitMQ server: nothing listens at host and port, or the network does not lead there. The
	// worker tries again for ever; correct host and port, or start the server.
	codeRabbitConnect errCode = "ERR-26112301201"
	// The TLS handshake with RabbitMQ failed. The hint says which side to mend: secure and port, ca_file, or the client
	// certificate in cert_file and key_file.
	codeRabbitTLS errCode = "ERR-26112301202"
	// RabbitMQ refuses user and password, or dropped the connection over them. Correct them; the user guest may only log
	// in from the broker's own host.
	codeRabbitLogin errCode = "ERR-26112301203"
	// RabbitMQ has no such virtual host, the user may not use it, or a connection limit is reached. Correct vhost, or
	// rabbitmqctl add_vhost and set_permissions.
	codeRabbitVHost errCode = "ERR-26112301204"
	// The server was reached but did not greet as RabbitMQ does: another service, TLS on a port that is used without, a
	// client certificate that is missing, or a server that hangs.
	codeRabbitHandshake errCode = "ERR-26112301205"
	// A connection to RabbitMQ was lost, or the broker did not answer in time. The worker connects again by itself.
	codeRabbitLost errCode = "ERR-26112301206"
	// The configured exchange does not exist and could not be declared. Declare it by hand, or let the user configure it.
	codeRabbitExchange errCode = "ERR-26112301207"
	// RabbitMQ did not let the worker look for the configured exchange. The text has the broker's reason.
	codeRabbitExchangeLook errCode = "ERR-26112301208"
	// The channel for publishing could not be opened. The text has the broker's reason; it is tried again.
	codeRabbitPublisher errCode = "ERR-26112301209"
	// Nothing can be published while there is no connection. Events wait and are sent later; a task is refused.
	codeRabbitAway errCode = "ERR-26112301210"
	// RabbitMQ is short of memory or disk and takes no messages until it has them again. Events wait; free some.
	codeRabbitBlocked errCode = "ERR-26112301211"
	// RabbitMQ did not confirm a message, which may or may not have arrived. Events are sent again.
	codeRabbitPublish errCode = "ERR-26112301212"
	// A message could not be sent because the connection or its channel ended. Events are sent again.
	codeRabbitSend errCode = "ERR-26112301213"
	// No queue takes a task, so it was not accepted. Start a worker that has the job, or correct event and app_id.
	codeRabbitUnrouted errCode = "ERR-26112301214"
	// A job's queue could not be declared, or bound to the exchange. Give the user permission, or declare it by hand.
	codeRabbitQueue errCode = "ERR-26112301215"
	// No channel could be opened for a job's queue, such as when the broker's limit is reached. It is tried again.
	codeRabbitChannel errCode = "ERR-26112301216"
	// A job's queue could not be consumed. The text has the broker's reason, such as another's exclusive consumer.
	codeRabbitConsume errCode = "ERR-26112301217"
	// RabbitMQ closed the channel of a job's queue, such as for a task that was not acknowledged within consumer_timeout.
	// What was not acknowledged is delivered again, and the journal knows it. The worker consumes on.
	codeRabbitChannelLost errCode = "ERR-26112301218"
	// A delivery could not be settled because the channel that it came by has ended. RabbitMQ delivers it again, and the
	// journal tells that it is known.
	codeRabbitStale errCode = "ERR-26112301219"
	// A queue of the worker's own could not be declared or consumed, so messages to it, such as terminate, do not arrive.
	// Give the user configure, write and read permission on queues named {task_id}_worker, _listen and the like.
	codeRabbitSubscribe errCode = "ERR-26112301220"
	// The channel for the worker's own queues ended while one was given up. They are all declared again.
	codeRabbitUnsubscribe errCode = "ERR-26112301221"
	// RabbitMQ closed the channel for the worker's own queues. They are declared again.
	codeRabbitSubscriptions errCode = "ERR-26112301222"
)

// Redis.
const (
	// No connection to a Redis server could be made; the worker goes on trying. The text says which server, which user and
	// what was tried; the hint what to look at.
	codeRedisConnect errCode = "ERR-26112301301"
	// The server answers but cannot be used: part of a Redis Cluster, a Sentinel, a replica, or older than 6.2 with durable.
	// Name a standalone master, or several servers of which one is; with durable, one of version 6.2 or later.
	codeRedisServer errCode = "ERR-26112301302"
	// The connection to the Redis server was lost, did not answer for long, or the server refused what the worker needs; it
	// connects again. Look at the server and the network, and at the user's permissions where the text says NOPERM.
	codeRedisLost errCode = "ERR-26112301303"
	// Something was to be published while there was no connection to Redis. It is sent later where that is said; otherwise
	// try again when /health shows the broker as connected.
	codeRedisAway errCode = "ERR-26112301304"
	// A message could not be published to Redis, or it is not known whether it was. The text has the server's answer.
	codeRedisPublish errCode = "ERR-26112301305"
	// A task was published to a Redis channel that no worker listens on. Start a worker with that job, or set durable: true,
	// which keeps tasks until there is one.
	codeRedisNoWorker errCode = "ERR-26112301306"
	// A plain task was won by this worker and could not be accepted, given to another worker or claimed in time: it is lost.
	// Mend what the lines before say, send the task again, and set durable: true where tasks must not be lost.
	codeRedisTaskLost errCode = "ERR-26112301307"
	// The streams of tasks could not be read; the worker goes on trying. The text has the server's answer.
	codeRedisRead errCode = "ERR-26112301308"
	// A job's stream cannot be used: the key holds something else than a stream, or the user may not use it. Delete or
	// rename the key, or give the permission; other jobs are not affected.
	codeRedisStream errCode = "ERR-26112301309"
	// A finished task could not be acknowledged to Redis. It is tried again for as long as this worker runs; if it stops
	// before, another may run the task once more.
	codeRedisSettle errCode = "ERR-26112301310"
	// A running task is not this worker's any more: it was out of touch with Redis for over 30 s, Redis lost its data, or
	// another worker has the same identity. The task may run twice. Give each worker an identity_id of its own.
	codeRedisClaim errCode = "ERR-26112301311"
)

// A codedError is an error with its code: what was being done to what, why it failed, and perhaps what would help.
type codedError struct {
	code errCode
	op   string
	err  error
	hint string // one line for people, printed below the error; may be empty
}

// fail wraps err with its code and with what was being done when it occurred ("open config \"x.yaml\"").
// A nil err is allowed where op says it all.
func fail(code errCode, op string, err error) error {
	return &codedError{code: code, op: op, err: err}
}

// failHint is fail with a line that tells a person what to do.
func failHint(code errCode, op string, err error, hint string) error {
	return &codedError{code: code, op: op, err: err, hint: hint}
}

func (e *codedError) Error() string {
	if e.err == nil {
		return e.op
	}
	return e.op + ": " + e.err.Error()
}

func (e *codedError) Unwrap() error { return e.err }

// codedText is an error in one line with its code, for those who see no log.
func codedText(err error) string {
	if code := codeOf(err); code != "" {
		return err.Error() + " [" + string(code) + "]"
	}
	return err.Error()
}

// codeOf gives the outermost code in err's chain, "" if there is none.
func codeOf(err error) errCode {
	var coded *codedError
	if errors.As(err, &coded) {
		return coded.code
	}
	return ""
}

// hintOf gives the outermost hint in err's chain.
func hintOf(err error) string {
	var coded *codedError
	for errors.As(err, &coded) {
		if coded.hint != "" {
			return coded.hint
		}
		err = coded.err
	}
	return ""
}

// errAttrs is an error as log attributes: the text and, when it has one, the code. slog asks only the outermost value
// for a LogValue, so a wrapped code would vanish without it.
func errAttrs(err error) slog.Attr {
	if code := codeOf(err); code != "" {
		return slog.Group("", slog.String("err", err.Error()), slog.String("code", string(code)))
	}
	return slog.Group("", slog.String("err", fmt.Sprint(err)))
}
